"What no single notebook can check: that the parts of the project agree, and that its pages stay small enough to read."
import ast
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
import yaml
from notebooks import CHAPTERS, PAGES, ROOT, definitions, directives, links
from readme import render

BIN = Path(sys.executable).parent
MODULES = sorted((ROOT/'dreamplus').rglob('*.py'))
HAND_WRITTEN = {'__init__.py', '__main__.py', 'all.py', '_modidx.py'}

def read(name): return (ROOT/name).read_text(encoding='utf-8')

def run(*command, cwd=ROOT):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} # which stops nbdev from exporting
    done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    if done.returncode: pytest.fail(done.stdout + done.stderr, pytrace=False)
    return done.stdout

def refuse(offenders, remedy):
    "Fail with one line for each offender"
    if offenders: pytest.fail('\n  '.join([f'{remedy}:', *map(str, offenders)]), pytrace=False)

@pytest.fixture(scope='module')
def settings():
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

# Notebooks, and what comes out of them

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A copy of what nbdev reads and writes"
    copy = tmp_path_factory.mktemp('tree')
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, copy)
    for name in ('nbs', 'dreamplus'): shutil.copytree(ROOT/name, copy/name, symlinks=True)
    return copy

def contents(folder, pattern): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob(pattern)}
def changed(a, b): return sorted(name for name in a | b if a.get(name) != b.get(name))

def test_modules_are_what_the_notebooks_export(tree):
    for path in (tree/'dreamplus').rglob('*.py'):
        if path.name not in HAND_WRITTEN: path.unlink() # so that a module without a notebook is missed
    run(BIN/'nbdev_export', cwd=tree)
    refuse(changed(contents(ROOT/'dreamplus', '*.py'), contents(tree/'dreamplus', '*.py')),
           'not what the notebooks export; edit the notebook and run nbdev_export')

def test_notebooks_are_clean(tree):
    before = contents(tree/'nbs', '*.ipynb')
    run(BIN/'nbdev_clean', cwd=tree)
    refuse(changed(before, contents(tree/'nbs', '*.ipynb')), 'run nbdev_clean')

def test_readme_is_the_index():
    assert read('README.md') == render(), 'run python tests/readme.py --write'

def test_notebooks_name_no_machine():
    path = re.compile(r'(?<![\w.])/(?:work|root|tmp|home|Users)/\w[\w./-]*')
    texts = {nb: json.dumps(nb.cells).replace('\\n', '\n') for nb in PAGES}
    refuse([(nb, found[0]) for nb, text in texts.items() if (found := path.search(text))], 'absolute paths')

# Floors: a module stands on lower numbers only

def dotted(path): return '.'.join(path.relative_to(ROOT).with_suffix('').parts)
@cache
def parsed(path): return ast.parse(path.read_text(encoding='utf-8'))

def imports(path):
    "What `path` imports of the package: 'dreamplus.core.seeded', or 'dreamplus.core.*'"
    package = dotted(path).split('.')[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else []
            names = ['.'.join([*above, *filter(None, [node.module]), a.name]) for a in node.names]
        else: continue
        yield from (name for name in names if name.split('.')[0] == 'dreamplus')

def test_notebooks_are_numbered_without_letters():
    refuse([nb for nb in CHAPTERS if not re.fullmatch(r'\d\d_[a-z_.]+\.ipynb', nb.name)],
           'name it as in 20_nets.convnet.ipynb')
    numbers = [nb.name[:2] for nb in CHAPTERS]
    refuse([nb for nb in CHAPTERS if numbers.count(nb.name[:2]) > 1], 'share a number')

def test_modules_import_lower_numbers_only():
    numbers = {dotted(nb.module): int(nb.name[:2]) for nb in CHAPTERS if nb.module} | {'dreamplus.all': 99}
    def number(name): return next((n for module, n in numbers.items() if f'{name}.'.startswith(f'{module}.')), -1)
    found = [(nb, name) for nb in CHAPTERS if nb.module for name in imports(nb.module)]
    refuse([(nb, name) for nb, name in found if number(name) >= int(nb.name[:2])],
           'imports from a notebook that is not below')

def test_a_folder_is_a_floor():
    tens = {}
    for nb in CHAPTERS:
        if nb.module: tens.setdefault(nb.module.parent.name, {}).setdefault(nb.name[0], []).append(nb)
    refuse([(folder, floors) for folder, floors in tens.items() if folder != 'dreamplus' and len(floors) > 1],
           'one folder on several floors')

PRIVATE = re.compile(r'_[^_]')

def private_of(tree):
    "The private names that a module defines: functions, classes, methods, variables, attributes of self"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store): yield node.attr

def test_no_private_name_crosses_modules():
    trees = {p: parsed(p) for p in MODULES if p.name != '_modidx.py'}
    own = {p: {n for n in private_of(tree) if PRIVATE.match(n)} for p, tree in trees.items()}
    crossing = [(dotted(p), name) for p in trees for name in imports(p) if PRIVATE.match(name.split('.')[-1])]
    private = set().union(*own.values())
    crossing += [(dotted(p), node.attr) for p, tree in trees.items() for node in ast.walk(tree)
                 if isinstance(node, ast.Attribute) and node.attr in private - own[p]]
    refuse(crossing, 'private to another module; make it public or merge it')

def test_no_cell_is_exported_silently():
    refuse([(nb, s.split('\n')[1]) for nb in CHAPTERS for s in nb.code if 'exporti' in directives(s)],
           'use export or exports')

def test_the_door_is_narrow():
    import builtins

    import torch
    from fastai.vision import all as vision
    names = {}
    exec('from dreamplus.all import *', names)
    names.pop('__builtins__')
    refuse([n for n, v in names.items() for m in (vision, torch, builtins) if getattr(m, n, v) is not v],
           '`from dreamplus.all import *` shadows')
    assert 30 <= len(names) <= 52

def test_star_imports_only_in_all():
    refuse([(dotted(p), name) for p in MODULES if p.name != 'all.py' for name in imports(p) if name.endswith('.*')],
           'name what you import')

def test_import_is_quick():
    code = ("import time; start = time.perf_counter(); import dreamplus; seconds = time.perf_counter() - start\n"
            "import sys; print(seconds, *{'torch', 'fastai'} & set(sys.modules))")
    runs = [run(sys.executable, '-c', code).split() for _ in range(3)]
    refuse(runs[0][1:], '`import dreamplus` must not import')
    assert min(float(seconds) for seconds, *_ in runs) < .3

# Budgets: what fits in a head

def over(limit, measure, pages=CHAPTERS): return [(nb, measure(nb)) for nb in pages if measure(nb) > limit]
def line_count(source): return source.count('\n') + 1

def test_exported_cells_are_small():
    refuse(over(50, lambda nb: max(map(line_count, nb.exported), default=0)), 'exported cell of more than 50 lines')
    assert statistics.median(line_count(s) for nb in CHAPTERS for s in nb.exported) <= 22

def test_functions_are_short():
    functions = [(dotted(p), f.name, f.end_lineno - f.lineno + 1) for p in MODULES
                 for f in ast.walk(parsed(p)) if isinstance(f, ast.FunctionDef)]
    refuse([f for f in functions if f[-1] > 40], 'function of more than 40 lines')

def test_notebooks_are_small():
    refuse(over(150, lambda nb: nb.path.stat().st_size/1024), 'chapter of more than 150 KB; store smaller pictures')
    refuse(over(500, lambda nb: nb.path.stat().st_size/1024, PAGES), 'page of more than 500 KB; store smaller pictures')
    refuse(over(500, lambda nb: sum(map(line_count, nb.code))), 'more than 500 lines of code; split the notebook')
    refuse(over(120, lambda nb: max(len(line) for s in nb.code for line in s.split('\n'))), 'line of more than 120')
    refuse(over(18, lambda nb: len(nb.public)), 'more than 18 public names')

def test_few_lines_are_long():
    lines = [line for nb in CHAPTERS for s in nb.code for line in s.split('\n')]
    assert sum(len(line) > 100 for line in lines)/len(lines) < .07

def test_prose_keeps_pace_with_code():
    refuse(over(2.5, lambda nb: len(nb.code)/len(nb.prose)), 'more than 2.5 code cells per prose cell')

def test_exported_cells_are_followed_by_an_example():
    shown = [example for nb in CHAPTERS for _, example in nb.ideas]
    assert sum(shown)/len(shown) >= .6

def test_few_exported_cells_are_private():
    private = [all(n[0] == '_' for n in names) for nb in CHAPTERS for names, _ in nb.ideas]
    assert sum(private)/len(private) <= .25

def test_private_functions_say_what_they_do():
    functions = [(nb, f) for nb in CHAPTERS for s in nb.exported for f in definitions(s).values()
                 if isinstance(f, ast.FunctionDef) and f.name[0] == '_' != f.name[1]]
    refuse([(nb, f.name) for nb, f in functions if not ast.get_docstring(f) and f.end_lineno > f.lineno + 2],
           'give it a docstring, or merge it')

def test_public_names_are_shown():
    "Helpers of an idea may stand in its cell; but four names of five are used where a reader sees it"
    names = [(nb, name) for nb in CHAPTERS for name in nb.public]
    hidden = [(nb, name) for nb, name in names if name not in nb.used]
    if len(hidden) > len(names)/5: refuse(hidden, 'not used in a visible cell')

# The site: pages, links, sidebar

def test_pages_open_with_title_and_subtitle():
    opening = re.compile(r'# \S.*\n+> \S.*\s*') # nbdev drops everything else in this cell
    refuse([nb for nb in PAGES if not opening.fullmatch(nb.cells[0]['source'])],
           'first cell: `# title` and `> subtitle` of one line, and nothing else')

def test_chapters_lead_to_the_next():
    ends = [re.search(r'^Next: .*?\]\(([^)#]+)', nb.cells[-1]['source'], re.M | re.S) for nb in CHAPTERS]
    refuse([(nb, after) for nb, end, after in zip(CHAPTERS, ends, CHAPTERS[1:]) if not end or end[1] != after.name],
           'last cell: `Next:` with a link to')

def test_links_resolve():
    texts = [(nb.path, s) for nb in PAGES for s in nb.prose]
    texts += [(p, p.read_text(encoding='utf-8')) for p in (*ROOT.glob('*.md'), ROOT/'results'/'README.md')]
    found = [(path, link) for path, text in texts for link in links(text)]
    refuse([(path.name, link) for path, link in found if not (path.parent/link).exists()], 'leads nowhere')

def test_sidebar_lists_every_page():
    sections = yaml.safe_load(read('_quarto.yml'))['website']['sidebar']['contents']
    listed = [page for section in sections for page in section.get('contents', ())] # a line between sections has none
    refuse(set(listed) ^ {nb.name for nb in PAGES}, 'only in the sidebar of _quarto.yml, or only in nbs')
    assert [page for page in listed if page[0].isdigit()] == [nb.name for nb in CHAPTERS]

# The project's own files

def test_quarto_agrees_with_settings(settings):
    link, site = ROOT/'nbs'/'_quarto.yml', yaml.safe_load(read('_quarto.yml'))
    assert link.is_symlink() and link.resolve() == ROOT/'_quarto.yml'
    assert site['project']['output-dir'] == settings['doc_path']
    assert site['website']['title'] == settings['title']
    assert site['website']['repo-url'] == settings['git_url']
    assert site['website']['site-url'] == settings['doc_host'] + settings['doc_baseurl']

@pytest.mark.parametrize('key, pins', [('requirements', 'fastai>=2.8.7,<3 plum-dispatch<2.10 torch>=2.11'),
                                       ('dev_requirements', 'nbdev>=2.4.14,<3 execnb<0.2 fastcore<2')])
def test_pins(settings, key, pins): assert set(pins.split()) <= set(settings[key].split())

def test_setup_agrees_with_settings(settings, monkeypatch):
    given = {}
    monkeypatch.setattr('setuptools.setup', lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(ROOT)
    runpy.run_path('setup.py')
    assert set(given['packages']) == {dotted(p.parent) for p in MODULES}
    patterns = [p for globs in given['package_data'].values() for p in globs]
    refuse([p for p in (ROOT/'dreamplus').rglob('*.json') if not any(p.match(pattern) for pattern in patterns)],
           'not in package_data of setup.py')
    assert given['install_requires'] == settings['requirements'].split()
    assert given['version'] == yaml.safe_load(read('CITATION.cff'))['version']
    assert f'__version__ = "{given["version"]}"' in read('dreamplus/__init__.py')
    assert f'## [{given["version"]}]' in read('CHANGELOG.md')

def test_ci_runs_the_command_of_the_readme():
    command = read('.ci/run').rstrip().split('\n')[-1]
    assert 'tests/run.py' in command and command in read('README.md').split('\n')
    assert 'run: bash .ci/run' in read('.github/workflows/check.yml')

def test_ruff(): run(BIN/'ruff', 'check', 'dreamplus', 'tests')

def test_nothing_generated_is_in_git():
    if not (ROOT/'.git').exists() or not shutil.which('git'): pytest.skip('needs a git checkout')
    files = run('git', 'ls-files', '--cached', '--others', '--exclude-standard').split('\n')
    generated = re.compile(r'(^|/)(\.ipynb_checkpoints|__pycache__|build|dist|_docs|_proc|\.venv|[^/]+\.egg-info)/')
    refuse([f for f in files if generated.search(f)], 'generated; ignore or remove it')
