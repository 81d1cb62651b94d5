"Numbers, not prose: what the README and the pages of results show is drawn from the records under `results/`."
import json
import re

import pytest
from execnb.shell import CaptureShell
from notebooks import CHAPTERS, PAGES, ROOT, body, directives

from dreamplus.labs.reproduce import CELLS

RESULTS = ROOT/'results'
SHOWN = [nb for nb in PAGES if nb.name == 'index.ipynb' or nb.name.startswith('results/')]
RUNS = sorted({*RESULTS.rglob('result.json'), *RESULTS.rglob('reproduced.json')})
# the thousand numbers of these reach a page through its cells alone
MANY = sorted({*RESULTS.glob('study-*/*.json'), *RESULTS.glob('compare-*/*-ipc*-seed*.json'),
               *RESULTS.glob('scores-*/*.json')})
SMALL = sorted(RESULTS.glob('*.json')) # of `python -m benchmarks...`
# 91.3, and 5.4 or 5 where a unit says what it is; no part of a version or a longer decimal
WHOLE = r'(?:%|points|per cent|seconds|minutes|times|(?:ms|s)\b)(?! interval)'
UNIT = rf'(?:{WHOLE}|(?:MiB|GiB)\b)'
NUMBER = re.compile(rf'(?<![\w.-])(\d\d\.\d|\d+\.\d(?=\s*{UNIT})|\d+(?=\s*{WHOLE}))(?![\d.])')

def prose(page): return [c['source'] for c in page.cells if c['cell_type'] == 'markdown']
def unquoted(text): return re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)

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
    with pytest.MonkeyPatch.context() as patch:
        ran = {}
        for page in SHOWN:
            patch.chdir(page.path.parent)
            ran[page] = run(page)
        return ran

def numbers(text): return {*re.findall(r'(?<![\w.])\d+(?:\.\d)?(?![\d.])', text)}

@pytest.fixture(scope='module')
def drawn(pages):
    "What each page draws from the records as they are now"
    return {page: numbers('\n'.join(now for now, _ in pairs)) for page, pairs in pages.items()}

def test_pages_say_what_the_records_hold(pages):
    stale = [f'{page}\n--- stored\n{stored}\n--- from the records\n{now}'
             for page, pairs in pages.items() for now, stored in pairs if now != stored]
    if stale: pytest.fail('build these pages anew:\n' + '\n'.join(stale), pytrace=False)

def undrawn(text, drawn):
    published = {f'{c.value:.1f}' for c in CELLS.values()} if 'published' in text else set()
    return [n for n in NUMBER.findall(unquoted(text)) if n not in drawn | published]

def test_prose_shows_no_number_that_no_record_holds(drawn):
    texts = [(page, p, drawn[page]) for page in SHOWN for source in prose(page) for p in source.split('\n\n')]
    texts += [(name, p, set().union(*drawn.values())) for name in ('README.md', 'results/README.md')
              for p in (ROOT/name).read_text(encoding='utf-8').split('\n\n')]
    found = [f'{page}: {", ".join(none)} in: {text}' for page, text, held in texts if (none := undrawn(text, held))]
    if found: pytest.fail('no record holds\n' + '\n'.join(found), pytrace=False)

@pytest.mark.parametrize('chapter', CHAPTERS, ids=str)
def test_chapters_show_no_number_that_they_neither_compute_nor_read(chapter):
    shown = '\n'.join(said(c['outputs']) for c in chapter.cells if c['cell_type'] == 'code')
    computed = numbers(shown)
    found = [f'{", ".join(none)} in: {text}' for text in chapter.prose if (none := undrawn(text, computed))]
    if found: pytest.fail('no record holds\n' + '\n'.join(found), pytrace=False)

def test_invented_numbers_are_found(drawn):
    assert undrawn('It reaches 99.87 and scores 12.3 (`45.6` in code).', {'45.6'}) == ['12.3']
    assert undrawn('torch 2.15.0 gains 7.7 points, width-32.5, at 0.25', set()) == ['7.7']
    assert undrawn('12 sets gain 7 points; the 95 % interval', set()) == ['7']
    assert undrawn('published: 69.4', set()) == [] and undrawn('claimed: 69.4', set()) == ['69.4']
    assert numbers('| 91.3 ± 1.0 | 3 nets, torch 2.15.0') == {'91.3', '1.0', '3'}

@pytest.mark.parametrize('path', RUNS + MANY + SMALL, ids=lambda p: p.relative_to(RESULTS).as_posix())
def test_records_say_how_they_came_about(path):
    record = json.loads(path.read_text(encoding='utf-8'))
    if 'command' not in record: record['command'] = (path.parent/'command.txt').read_text(encoding='utf-8')
    assert record['command'].strip().startswith(('dreamplus ', 'OMP_NUM_THREADS', 'python -m benchmarks'))
    assert {'dreamplus', 'torch'} <= set(record['versions'])
    digests = record['data'].values() if isinstance(record['data'], dict) else [record['data']]
    assert digests and all(re.fullmatch(r'[0-9a-f]{16,}', d) for d in digests)
    assert record['device'] and ('seed' in record or record['seeds'])
