"The site, as `nbdev_docs` hands it to Quarto: no text is lost, every link and anchor leads somewhere, pages fit."
import base64
import json
import posixpath
import re
import shlex
from collections import Counter
from html import unescape
from io import BytesIO

import pytest
import yaml
from notebooks import CHAPTERS, NBS, PAGES, ROOT
from PIL import Image
from test_project import refuse
from website import continued, homes, html_name, process, render, unbroken, whole_options, wrapped

from dreamplus.cli import COMMANDS
from dreamplus.options import overrides, parse_command
from dreamplus.recipes import METHODS

@pytest.fixture(scope='module')
def site():
    "{name: (processed notebook, HTML)} of every page, made once"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NBS) # whose settings.ini nbdev reads
        processed = {page.name: process(page) for page in PAGES}
    return {name: (nb, render(nb)) for name, nb in processed.items()}

def words(text):
    "Text without the addresses of links, spans and punctuation"
    text = re.sub(r'</?(?:span|code)\b[^>]*>|\{[^}]*\}', '', unescape(text))
    return ' '.join(re.findall(r'\w+', re.sub(r'\]\([^)]*\)', ']', text)))

def test_no_text_is_lost(site):
    lost = []
    for page in PAGES:
        cells = site[page.name][0].cells
        front = yaml.safe_load(cells[0].source.strip().strip('-'))
        kept = ' '.join(words(c.source) for c in cells[1:] if c.cell_type == 'markdown')
        opening = words(f'{front["title"]} {front["description"]}')
        if words(page.cells[0]['source']) != opening: lost.append((page, opening))
        lost += [(page, s[:60]) for s in page.prose[1:] if words(wrapped(s)) not in kept]
    refuse(lost, 'text that nbdev drops')

def test_links_and_anchors_lead_somewhere(site):
    pages = {html_name(name): html for name, (_, html) in site.items()}
    anchors = {name: {*re.findall(r'\bid="([^"]+)"', html)} for name, html in pages.items()}
    broken = []
    for name, html in pages.items():
        for link in map(unescape, re.findall(r'(?:href|src)="(?!\w+:)([^"]+)"', html)):
            path, _, anchor = link.partition('#')
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if target not in pages and not (NBS/target).is_file() or anchor and anchor not in anchors.get(target, ()):
                broken.append((name, link))
    refuse(broken, 'links of the site that lead nowhere')

def test_pictures_have_a_text(site):
    found = [(name, tag) for name, (_, html) in site.items() for tag in re.findall(r'<img\b[^>]*', html)]
    without = [(name, tag) for name, tag in found if not re.search(r'alt="[^"]{8,}"', tag)]
    refuse([(name, re.sub(r'base64,\S+', '...', tag)[:90]) for name, tag in without],
           'pictures without alt text; write #| fig-alt: in their cell')

def figures():
    "(page, cell) of every code cell, with the width in pixels at which its pictures are shown on the site"
    for page in PAGES:
        for cell in json.loads(page.path.read_text(encoding='utf-8'))['cells']:
            for out in cell.get('outputs', []):
                if picture := out.get('data', {}).get('image/png'):
                    width = int.from_bytes(base64.b64decode(''.join(picture)[:64])[16:20])
                    yield page, ''.join(cell['source']), out['metadata'].get('image/png', {}).get('width', width)

def test_type_in_figures_has_10_points():
    # matplotlib's own 100 dots per inch and 10 points are 10.4 points on a page, unless the column shrinks the figure
    column = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['format']['html']['grid']['body-width']
    widest = (int(column.removesuffix('px')) - 50)*100/96
    refuse([(page, width) for page, _, width in figures() if width > widest], 'pictures wider than the column')
    rule = re.compile(r"figure\.dpi|\bdpi=(?!100\b)\d|(?:fontsize|labelsize)=(?:\d(?!\d)|'(?:x+-)?small)")
    small = [(page, line) for page in PAGES for cell in page.code for line in cell.split('\n') if rule.search(line)]
    refuse(small, 'figures with type below 10 points; leave dpi and sizes to matplotlib')

def test_no_picture_is_enlarged():
    blurred = []
    for page in PAGES:
        for cell in json.loads(page.path.read_text(encoding='utf-8'))['cells']:
            for out in cell.get('outputs', []):
                for kind in {'image/png', 'image/jpeg'} & {*out.get('data', ())}:
                    width = Image.open(BytesIO(base64.b64decode(''.join(out['data'][kind])))).width
                    if out['metadata'].get(kind, {}).get('width', 0) > width: blurred.append((page, width))
    refuse(blurred, 'pictures that are shown wider than they are')

def test_no_picture_is_shown_twice_on_a_page(site):
    shown = Counter((name, data) for name, (_, html) in site.items()
                    for data in re.findall(r'base64,([^"]{500,})', html))
    refuse([name for (name, _), n in shown.items() if n > 1], 'pictures that repeat another')

def test_outputs_are_plain_text(site):
    debris = re.compile(r'\x1b\[|\r(?!\n)|^<[\w.]+ .*at 0x|(?:User|Future|Deprecation)Warning:|^[IWE]\d{4} \d\d:', re.M)
    texts = [(page, ''.join(out.get('text', ()) or out.get('data', {}).get('text/plain', ())))
             for page in PAGES for cell in page.cells for out in cell.get('outputs', ())
             if not {'text/html', 'text/markdown'} & {*out.get('data', ())}]
    refuse([(page, found[0]) for page, text in texts if (found := debris.search(text))], 'outputs that nobody reads')

def test_pictures_of_scripts_have_type_of_10_points():
    column = 690 # pixels, narrower than those of GitHub and PyPI
    small = []
    for script in ROOT.glob('results/*.py'):
        text = script.read_text(encoding='utf-8')
        width, dpi = (float(re.search(rf'{name}=\(?([\d.]+)', text)[1]) for name in ('figsize', 'dpi'))
        shown = min(1, column/(width*dpi))*dpi/96 # of a point
        small += [(script, size) for size in re.findall(r'fontsize=(\d+)', text) if int(size)*shown < 10]
    refuse(small, 'type below 10 points in the column')

def test_options_in_prose_are_code(site):
    code = re.compile(r'<pre.*?</pre>|<code.*?</code>|<[^>]*>', re.S)
    found = [(name, option) for name, (_, html) in site.items()
             for option in re.findall(r'(?<![\w-])--[a-z]\w*', code.sub('', html))]
    refuse(found, 'options in prose, whose two hyphens become a dash')

def test_parts_of_pages_survive_pandoc(site):
    refuse([name for name, (_, html) in site.items() if '<div>' in html], 'div without a class, which pandoc drops')
    glued = re.compile(r'^(?![*-] |\d+\. | |\||$).*\n(?:[*-]|\d+\.) .*', re.M)
    lists = [(page, line) for page in PAGES for s in page.prose
             for line in glued.findall(re.sub(r'```.*?```', '', s, flags=re.S))]
    refuse(lists, 'lists without an empty line before them, which pandoc reads as text')

def test_headings_are_in_order(site):
    jumps = []
    for name, (_, html) in site.items():
        levels = [int(level) for level in re.findall(r'<h(\d)\b', html)]
        jumps += [name for a, b in zip(levels, levels[1:]) if b > a + 1]
    refuse(jumps, 'headings that skip a level')

def test_long_lines_wrap(site):
    quarto = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['format']['html']
    assert quarto['code-overflow'] == 'wrap'
    assert re.search(r'main pre[^{]*{[^}]*pre-wrap', (NBS/quarto['css']).read_text(encoding='utf-8'))
    # what wrapping would destroy: drawings made of text
    blocks = [(page, block) for page in PAGES for s in page.prose
              for language, block in re.findall(r'^```(\w*)\n(.*?)^```$', s, re.M | re.S) if not language]
    drawings = [(page, line) for page, block in blocks for line in block.split('\n') if len(line) > 100]
    refuse(drawings, 'wider than the column')

@pytest.mark.parametrize('asked, page', [('own data', 'tutorials/new_dataset.ipynb'), ('own data', 'index.ipynb'),
                                         ('exports', '52_distilled.ipynb'), ('Export', 'index.ipynb')])
def test_search_finds_what_users_ask_for(site, asked, page): assert asked in site[page][1]

def test_functions_have_tables_of_arguments(site):
    html = site['66_loop.distill.ipynb'][1]
    about = html[html.index('id="distill"'):]
    table = about[:about.index('</table>')]
    assert re.findall(r'<th>(.*?)</th>', table) == ['argument', 'type', 'default', 'meaning']
    row = next(row for row in table.split('</tr>') if '<code>ipc</code>' in row)
    cells = [re.sub('</?span[^>]*>', '', cell) for cell in re.findall(r'<td>(.*?)</td>', row)]
    assert cells[1:3] == ['<code>int</code> or <code>list</code>', '<code>1</code>']
    assert '](' not in table

def test_the_index_lists_every_public_name(site):
    html = site['99_all.ipynb'][1]
    names = {name for nb in CHAPTERS if nb.module and nb.module.stem != 'all' for name in nb.public}
    refuse([name for name in names if f'<code>{name}</code></a>' not in html], 'not in the index')

def test_names_lead_to_their_headings(site):
    headings = {}
    for name, (_, html) in site.items():
        for level, anchor, text in re.findall(r'<h(\d) id="([^"]+)">(.*?)</h', html):
            headings[f'{html_name(name)}#{anchor}'] = level, re.sub('<[^>]*>', '', text)
    wrong = []
    for name, where in homes().items():
        level, text = headings.get(where, ('', ''))
        part = name.removeprefix('dreamplus.')
        if '#' in where and '._' not in part and level != '2' and not part.endswith(text):
            wrong.append((name, where, text))
    refuse(wrong, 'names whose link leads to another heading')

def test_narrow_columns_keep_options_and_names_whole(site):
    html = site['results/leaderboard.ipynb'][1]
    assert '<span class="unbroken">k-means (baseline)</span>' in html
    assert '<span class="unbroken"><code>--minutes</code></span>' in site['glossary.ipynb'][1]
    command = '<code>dreamplus bank <span class="unbroken">&#45;&#45;list</span></code>' # two hyphens become a dash
    assert unbroken('`dreamplus bank --list`') == command
    assert '<span class="unbroken">--set lr=X</span>)' in whole_options('a smaller rate (--set lr=X)')
    assert '<span class="unbroken">--data</span>: labels' in site['guides/troubleshooting.ipynb'][1]
    css = (NBS/'styles.css').read_text(encoding='utf-8')
    assert re.search(r'\.unbroken[^{]*{[^}]*nowrap', css)

def test_wide_pictures_scroll_on_a_phone(site):
    css = (NBS/'styles.css').read_text(encoding='utf-8')
    assert re.search(r'\.wide[^{]*img[^{]*{[^}]*max-width: 600px', css)
    assert '<div class="cell wide">' in site['results/speed.ipynb'][1]

@pytest.mark.parametrize('command', ['dreamplus plan digits', 'dreamplus distill cifar10' + ' --set factor=2'*9,
                                     'dreamplus bank cifar10' + ' --set bank_nets=1'*5 + ' # minutes',
                                     f'dreamplus scores {"run"*25} --nets 2 --archs mlp'])
def test_long_commands_continue_and_stay_the_same_for_a_shell(command):
    lines = continued(command).split('\n')
    assert all(3 < len(line) <= 95 for line in lines)
    assert shlex.split('\n'.join(lines).replace('\\\n', ''), comments=True) == shlex.split(command, comments=True)

def test_commands_are_shown_as_a_shell_takes_them(site):
    nb, html = site['guides/commands.ipynb']
    assert '```bash\ndreamplus distill digits --ipc 1' in '\n'.join(cell.source for cell in nb.cells)
    assert '!dreamplus' not in html

@pytest.mark.parametrize('name, page', [('distill', 'loop.distill'), ('plan', 'labs.plan'), ('compare', 'labs.compare'),
                                        ('DistilledSet.show', 'distilled'), ('METHODS', 'recipes')])
def test_names_lead_to_what_python_users_mean(name, page): assert homes()[name].split('#')[0] == f'{page}.html'

def shell_lines(page):
    "The commands of `dreamplus` that a page shows: in shell blocks, tables, cells, and the results of cells"
    for text in page.prose:
        for block in re.findall(r'```bash\n(.*?)```', text, re.S): yield from block.split('\n')
        yield from re.findall(r'^\| `(dreamplus [^`]*)`', text, re.M)
    for cell in page.cells:
        if cell['cell_type'] != 'code': continue
        printed = ''.join(''.join(out.get('text', '')) for out in cell['outputs'])
        if printed.startswith('dreamplus: error'): continue # a page that shows the error of a command
        yield from re.findall(r'^!(dreamplus .*)', cell['source'], re.M)
        yield from re.findall(r'^dreamplus [a-z].*', printed, re.M)

def test_commands_on_pages_are_commands():
    wrong, seen = [], 0
    pages = [p for p in PAGES if p.name.startswith(('guides/', 'tutorials/', 'index'))]
    for page, line in [(p, line) for p in pages for line in shell_lines(p)]:
        for command in re.split(r' && | & *$', line.split(' #')[0]):
            if not (command := command.strip()).startswith('dreamplus '): continue
            seen += 1
            try:
                _, given, _ = parse_command(COMMANDS, shlex.split(command)[1:])
                overrides(given.get('set'))
                if given.get('method', 'best') not in METHODS: raise ValueError(f'no method {given["method"]}')
            except ValueError as e: wrong.append((page, command, str(e)))
    refuse(wrong, 'commands that dreamplus refuses')
    assert seen > 40

@pytest.mark.parametrize('page, says', [('changelog', 'Keep a Changelog'), ('contributing', 'Notebooks are the source'),
                                        ('licence', '<li><strong>DataDAM</strong>: A. Sajedi')])
def test_the_notes_of_the_project_are_on_the_site(site, page, says):
    assert says in site[f'project/{page}.ipynb'][1]

def test_guides_and_tutorials_open_in_colab(site):
    found = {name for name, (_, html) in site.items() if 'colab.research.google.com/github/' in html}
    beside = {page.name for page in PAGES if any('../results' in s for s in page.code)} # needs the repository
    assert found == {name for name in site if name.startswith(('guides/', 'tutorials/'))} - beside
    assert 'blob/main/nbs/guides/quick_start.ipynb' in site['guides/quick_start.ipynb'][1]
