"What a user gets: a package that installs from its source archive and runs, and a README whose example runs twice."
import shutil
import sys
import tarfile
import zipfile
from email.parser import Parser

import nbformat
import pytest
from notebooks import NBS, ROOT, body
from processes import forked
from test_project import MODULES, refuse, run

BUILD = 'import sys; from setuptools import build_meta as b; getattr(b, "build_" + sys.argv[1])(sys.argv[2])'

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The files of the wheel that is built from the source archive, and from nothing else"
    folder = tmp_path_factory.mktemp('package')
    for p in ROOT.iterdir(): # all that a checkout has at its top, and the package
        if p.is_file(): shutil.copy(p, folder)
    shutil.copytree(ROOT/'dreamplus', folder/'dreamplus', ignore=shutil.ignore_patterns('__pycache__'))
    run(sys.executable, '-W', 'ignore', '-c', BUILD, 'sdist', '.', cwd=folder)
    [archive] = folder.glob('*.tar.gz')
    safe = dict(filter='data') if hasattr(tarfile, 'data_filter') else {} # none before Python 3.11.4
    with tarfile.open(archive) as tar: tar.extractall(folder, **safe)
    source = folder/archive.name.removesuffix('.tar.gz')
    run(sys.executable, '-W', 'ignore', '-c', BUILD, 'wheel', '.', cwd=source)
    [built] = source.glob('*.whl')
    with zipfile.ZipFile(built) as z: z.extractall(folder/'installed')
    return folder/'installed'

def test_the_wheel_of_the_source_archive_is_complete(wheel):
    wanted = [*MODULES, *(ROOT/'dreamplus').rglob('*.json'), ROOT/'dreamplus'/'py.typed']
    refuse([p for p in wanted if not (wheel/p.relative_to(ROOT)).is_file()],
           'not in the wheel; see setup.py and MANIFEST.in')

def test_the_page_on_pypi_has_links_that_work(wheel):
    [metadata] = wheel.glob('*.dist-info/METADATA')
    given = Parser().parsestr(metadata.read_text(encoding='utf-8'))
    found = [link.split('](')[1] for link in given.get_payload().split(')') if '](' in link]
    refuse([link for link in found if not link.startswith(('https://', '#'))], 'relative links in the description')
    assert any(link.endswith('.png') and '/raw/' in link for link in found)
    labels = {label.split(',')[0] for label in given.get_all('Project-URL')}
    assert labels == {'Documentation', 'Source', 'Issues', 'Changelog'}
    assert {f'Programming Language :: Python :: 3.{n}' for n in (11, 12, 13)} <= {*given.get_all('Classifier')}

USE = """
import sys
sys.path.insert(0, WHEEL)
from importlib.metadata import distribution
from pathlib import Path
import dreamplus
assert dreamplus.__file__.startswith(WHEEL), dreamplus.__file__
ROWS = 'distilled', 'random'
for _ in range(2): exec(EXAMPLE)
assert len([*Path().glob('digits-ipc1-png/*/*.png')]) == 10
print(scores._repr_markdown_())
assert dset._repr_png_().startswith(b'\\x89PNG')
[command] = distribution('dreamplus').entry_points.select(group='console_scripts')
assert command.load()('distill digits --outer 1 --width 8 --nets 0 --out run --set bank_stages=4'.split()) == 0
"""

def test_the_installed_package_runs_the_example_twice_and_the_command(wheel, tmp_path):
    cells = nbformat.read(NBS/'index.ipynb', as_version=4).cells
    [example] = [body(c.source) for c in cells if c.cell_type == 'code' and 'to_imagefolder' in c.source]
    short = example.replace('ipc=1)', 'ipc=1, outer=1, width=8, bank_stages=4, log=None)')
    short = short.replace('n=3)', 'n=2, steps=2, rows=ROWS)')
    assert short.count('outer=1') == short.count('rows=ROWS') == 1
    status, said = forked(f'WHEEL, EXAMPLE = {str(wheel)!r}, {short!r}' + USE, tmp_path)
    assert status == 0 and 'Warning' not in said, said
    assert sum(line.startswith('distilled ') for line in said.split('\n')) == 2 # print(scores), twice
    assert '| set | test accuracy, % |' in said
    assert (tmp_path/'run'/'distilled.safetensors').is_file()
