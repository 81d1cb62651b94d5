"What the README and the pages of results say is drawn from the records under `results/`."
import json
import re
import sys
from pathlib import Path

import pytest
from execnb.shell import CaptureShell
from notebooks import CHAPTERS, PAGES, ROOT, body, directives

from dreamplus.labs.study import load_study

RESULTS = ROOT/'results'
GUIDES = 'guides/choose.ipynb', 'guides/processes.ipynb', 'guides/protocols.ipynb'
SHOWN = [nb for nb in PAGES if nb.name in ('index.ipynb', *GUIDES) or nb.name.startswith('results/')]
FILES = [p for p in RESULTS.rglob('*') if p.is_file() and p.name != '.lock' and '__pycache__' not in p.parts]
OPENED, WATCHING = set(), []

def watch(event, args):
    if WATCHING and event == 'open' and isinstance(args[0], (str, Path)): OPENED.add(Path(args[0]).resolve())

def said(outputs):
    "The text of outputs; a picture says nothing"
    texts = []
    for out in outputs:
        data = out.get('data', {})
        text = ''.join(data.get('text/markdown') or data.get('text/plain') or out.get('text', ''))
        if not re.fullmatch(r'<.*>', text): texts.append(text)
    return ''.join(texts)

def run(page):
    "What the cells of a page say of the records as they are now; what they are stored to say"
    shell = CaptureShell(path=page.path, mpl_format='png')
    shell.display_formatter.formatters['image/png'].enabled = False # pictures are not compared
    pairs = []
    for cell in page.cells:
        if cell['cell_type'] != 'code' or {'eval', 'default_exp'} & directives(cell['source']): continue
        outputs = shell.run(body(cell['source']))
        if shell.exc: pytest.fail(f'{page}: {shell.exc}\n{cell["source"]}', pytrace=False)
        if 'hide' in directives(cell['source']): continue
        pairs.append((said(o for o in outputs if o.get('name') != 'stderr'), said(cell['outputs'])))
    return pairs

@pytest.fixture(scope='module')
def pages():
    sys.addaudithook(watch)
    with pytest.MonkeyPatch.context() as patch:
        WATCHING.append(True)
        ran = {}
        for page in SHOWN:
            patch.chdir(page.path.parent)
            ran[page] = run(page)
        WATCHING.clear()
    return ran

def test_pages_say_what_the_records_hold(pages):
    stale = [f'{page}\n--- stored\n{stored}\n--- from the records\n{now}'
             for page, pairs in pages.items() for now, stored in pairs if now != stored]
    if stale: pytest.fail('run these pages again:\n' + '\n'.join(stale), pytrace=False)

def test_every_file_is_shown_by_a_page(pages):
    chapters = '\n'.join(s for nb in CHAPTERS for s in nb.code)
    used = {p for p in FILES if p in OPENED or f'results/{p.relative_to(RESULTS).as_posix()}' in chapters}
    used |= {*RESULTS.glob('best-digits-ipc1/distilled.*')} # `overview.py` draws the picture of the digits from them
    others = sorted({p.name for p in {*FILES} - used})
    assert others == ['README.md', 'gallery.py', 'overview.py'], 'no page shows these; remove them'

@pytest.fixture(scope='module')
def records():
    "All records by file; those of a study have the entries of its first line, too"
    studies = {p: load_study(p.parent) for p in FILES if p.name == 'records.jsonl'}
    return studies | {p: [json.loads(p.read_text(encoding='utf-8'))] for p in RESULTS.glob('*.json')}

def lacks(r):
    "What a record should say of how it came about, and does not"
    digests = r['data'].values() if isinstance(r.get('data'), dict) else [r.get('data', '')]
    if not digests or not all(re.fullmatch(r'[0-9a-f]{16,}', d) for d in digests): yield 'data'
    if not re.match(r'(OMP_NUM_THREADS=\d )?(dreamplus|python -m) ', r.get('command', '')): yield 'command'
    if not {'dreamplus', 'torch'} <= {*r.get('versions', {})}: yield 'versions'
    if not r.get('device'): yield 'device'
    if 'seed' not in r and not r.get('seeds'): yield 'seed'

def test_records_say_how_they_came_about(records):
    assert len(records) > 30
    found = {(p.relative_to(RESULTS).as_posix(), what) for p, own in records.items() for r in own for what in lacks(r)}
    assert sorted(found) == []

def test_records_do_not_repeat_what_they_share():
    for p in FILES:
        if p.name != 'records.jsonl': continue
        head, *lines = [json.loads(line) for line in p.read_text(encoding='utf-8').splitlines()]
        assert lines and not [k for line in lines for k in line if head.get(k, ...) == line[k]], p
        same = [k for k in lines[0] if all(k in line and line[k] == lines[0][k] for line in lines)]
        same = [k for k in same if len(lines) > 1 and len(json.dumps(lines[0][k])) > 60]
        assert not same, f'{p}: move to the first line'

def test_a_study_is_one_file():
    assert len(FILES) < 80
