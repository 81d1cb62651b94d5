"""The pages of the site, as nbdev processes them, and a plain preview of them where Quarto is not at hand.

`settings.ini` names `Tidy` as `procs`: `nbdev_docs` runs it after its own processors, in place of `add_links` and
`exec_show_docs`. `PYTHONPATH=tests nbdev_docs` builds the site. `python tests/website.py FOLDER` writes every page as
plain HTML with the styles of the site, without Quarto's design.
"""
import ast
import base64
import importlib
import posixpath
import re
import shutil
import sys
from collections import Counter
from contextlib import chdir
from functools import cache
from html import escape
from io import BytesIO
from pathlib import Path
from textwrap import wrap

import yaml
from execnb.nbio import mk_cell, nb2str, read_nb
from fastcore.docments import docments
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev.processors import FilterDefaults
from nbdev.showdoc import showdoc_nm
from nbformat.v4 import reads
from notebooks import CHAPTERS, LINK, NBS, PAGES, ROOT, Notebook, definitions
from PIL import Image

import dreamplus.all
from dreamplus._modidx import d as INDEX
from dreamplus.tables import markdown_table

SOURCE = f'{INDEX["settings"]["git_url"]}/blob/{INDEX["settings"]["branch"]}'
COMMANDS = 'dreamplus.commands', 'dreamplus.apps.commands' # whose functions share their names with others
# what holds no name to link: code blocks, links, headings, tables
NAME = re.compile(r'```.*?```|!?\[[^]]*\]\([^)]*\)|^#.*?$|^ *\|.*?$|<[^>]*>|`([\w.]+)(?:\(\))?`', re.S | re.M)
INCLUDE = re.compile(r'^\{\{< include (\S+) >\}\}$', re.M)

def html_name(page):
    "The file that Quarto writes for a notebook: `loop.distill.html` for `66_loop.distill.ipynb`"
    folder, name = posixpath.split(str(page))
    return posixpath.join(folder, re.sub(r'^\d+_', '', name).removesuffix('.ipynb').lower() + '.html')

@cache
def homes():
    "Where each name is documented: {'distill': 'loop.distill.html#distill'}; a name of two modules needs its module"
    found, full = {}, {}
    for module, names in INDEX['syms'].items():
        for name, (where, _) in names.items():
            place = anchors(module).get(name.removeprefix(f'{module}.'))
            full[name] = where = f'{where.split("#")[0]}#{place}' if place else where
            if module not in COMMANDS: found.setdefault(name.removeprefix(f'{module}.'), set()).add(where)
    for nb in CHAPTERS: # registries and tables, which have no heading of their own
        if nb.module and nb.module.stem not in ('all', 'cli'):
            for name in nb.public: found.setdefault(name, {html_name(nb.name)})
    return full | {name: min(where) for name, where in found.items() if len(where) == 1}

def link_names(text, page):
    "Link the first mention of each name in a text of `page` to where it is documented"
    linked, here, up = set(), html_name(page), '../'*str(page).count('/')
    def link(found):
        name = found[1]
        if not name or name in linked or '._' in f'.{name}' or not (where := homes().get(name)): return found[0]
        plain_word = name.islower() and name.isalpha() and name not in dreamplus.all.__all__ # such as train
        if plain_word and not where.startswith(f'{here}#'): return found[0]
        linked.add(name)
        return f'[{found[0]}]({up}{where})'
    return NAME.sub(link, text)

def defined(tree):
    "The documented names of a module: functions, classes, methods, patched methods, with their syntax"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names = showdoc_nm(node)
            for name in [names] if isinstance(names, str) else names: yield name, node
        elif isinstance(node, ast.ClassDef):
            yield node.name, node
            for f in node.body:
                if isinstance(f, ast.FunctionDef): yield f'{node.name}.{f.name}', f

def module_of(nb):
    "The dotted name of the module that a notebook exports, or None"
    return nb.module and '.'.join(nb.module.relative_to(ROOT).with_suffix('').parts)

@cache
def syntax(module):
    "{name: syntax} of a module"
    path = ROOT/f'{module.replace(".", "/")}.py'
    return dict(defined(ast.parse(path.read_text(encoding='utf-8'))))

@cache
def anchors(module):
    "{name: its anchor}; a name that differs from an earlier one in case only gets a number, as pandoc does"
    seen, found = Counter(), {}
    for name, node in syntax(module).items():
        if '._' in f'.{name}' or not ast.get_docstring(node): continue
        low = name.lower()
        found[name] = f'{low}-{seen[low]}' if seen[low] else low
        seen[low] += 1
    return found

def parameters(node):
    "(name, type, default) of each argument of a function or class, as written"
    if isinstance(node, ast.ClassDef):
        init = next((f for f in node.body if getattr(f, 'name', '') == '__init__'), None)
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
        if not init: return [(f.target.id, f.annotation, f.value) for f in fields] if node.decorator_list else []
        node = init
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    found = [*zip(plain, defaults), (a.vararg, None), *zip(a.kwonlyargs, a.kw_defaults), (a.kwarg, None)]
    stars = {a.vararg: '*', a.kwarg: '**'}
    return [(stars.get(arg, '') + arg.arg, arg.annotation, default) for arg, default in found
            if arg and arg.arg != 'self']

def code(node):
    "A type or default as code; alternatives are joined by `or`, since a | would end the cell of a table"
    if node is None: return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr): return f'{code(node.left)} or {code(node.right)}'
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'field': # of a dataclass
        return next((f'`{ast.unparse(k.value)}()`' for k in node.keywords if k.arg == 'default_factory'), None)
    return f'`{ast.unparse(node)}`'.replace(' | ', ' or ')

def reference(module, name):
    "What the site says of a name: heading, call, docstring, a table of its arguments; None without a docstring"
    node, obj = syntax(module).get(name), importlib.import_module(module)
    if not node or not (text := ast.get_docstring(node)): return None
    for part in name.split('.'): obj = getattr(obj, part)
    comments = docments(getattr(obj, 'fget', obj), full=True, args_kwargs=True)
    args, returns = parameters(node), getattr(node, 'returns', None)
    def said(arg): # options as code: typography makes a dash of two hyphens
        text = (comments.get(arg.lstrip('*')) or {}).get('docment')
        return text and re.sub(r'`[^`]*`|--[a-z][\w-]*', lambda m: f'`{m[0].strip("`")}`', text)
    def given(default): return (text := code(default)) and f'<span class="default">{text}</span>'
    rows = [(f'`{arg}`', code(kind), given(default), said(arg)) for arg, kind, default in args]
    if returns and not isinstance(returns, ast.Constant):
        rows.append(('*returns*', code(returns), None, said('return')))
    used = [i for i, column in enumerate(zip(*rows)) if i == 0 or any(column)]
    head = 'argument', 'type', 'default', 'meaning'
    table = markdown_table([head[i] for i in used], [[row[i] for i in used] for row in rows]) if len(used) > 1 else ''
    source = f'[source]({SOURCE}/{module.replace(".", "/")}.py#L{node.lineno}){{.source}}'
    table = table and f'::: {{.arguments}}\n\n{table}\n\n:::'
    return '\n\n'.join(filter(None, [f'### {name}', source, text, table]))

def name_index():
    "A table of all public names: what each is, and the page that defines it"
    rows = []
    for nb in CHAPTERS:
        if not nb.module or nb.module.stem == 'all': continue
        module = module_of(nb)
        for name in nb.public:
            node, page = syntax(module).get(name), html_name(nb.name)
            what = (ast.get_docstring(node) or '').split('\n')[0] if node else ''
            link = f'[`{name}`]({page}#{anchors(module)[name]})' if what else f'[`{name}`]({page})'
            rows.append((link, what, f'[{module.removeprefix("dreamplus.")}]({page})'))
    table = markdown_table(['name', 'what it is', 'module'], sorted(rows, key=lambda row: row[0].lower().split('`')[1]))
    return f'::: {{.names}}\n\n{table}\n\n:::'

def shown(cell):
    "The name that a cell documents"
    found = re.search(r'^show_doc\(([\w.]+)', cell.source, re.M) if cell.cell_type == 'code' else None
    return found and found[1]

def in_order(cells, names):
    "Cells of documentation and source code, sorted by definition; source code follows its documentation"
    lines = []
    for cell in cells:
        own = [shown(cell)] if shown(cell) else [*definitions(cell.source)]
        found = [names[n].lineno for n in own if n in names]
        lines.append(max(found) + (not shown(cell))/2 if found else lines[-1] if lines else 0)
    return [cell for _, cell in sorted(zip(lines, cells), key=lambda pair: pair[0])]

def included(name, page):
    "A file of the repository as a part of `page`: without its title, links relative to `page`; plain text flows"
    text = (ROOT/name).read_text(encoding='utf-8')
    def entry(found): return f'* **{found[1]}**: {" ".join(found[2].split())}'
    if not name.endswith('.md'):
        text = text.removeprefix('dreamplus\n') # the title of the file
        return re.sub(r'^(\S+) {2,}(\S.*(?:\n +.*)*)', entry, text, flags=re.M)
    def relink(found):
        if not found[2]: return found[0]
        if (ROOT/found[2].split('#')[0]).is_relative_to(NBS):
            return found[1] + posixpath.relpath(found[2].removeprefix('nbs/'), posixpath.dirname(page) or '.')
        return f'{found[1]}{SOURCE}/{found[2]}'
    return LINK.sub(relink, re.sub(r'^# .*\n', '', text))

def colab(page):
    "A link to run a guide or a tutorial in Colab; None for a page that reads the records beside it"
    if page.parts[0] not in ('guides', 'tutorials'): return None
    if any('../results' in source for source in Notebook(NBS/page).code): return None
    install = f'%pip install git+{INDEX["settings"]["git_url"]}'
    link = f'{SOURCE}/nbs/{page.as_posix()}'.replace('https://github.com/', 'https://colab.research.google.com/github/')
    return mk_cell(f'[Open in Colab]({link}). Run `{install}` there first.', 'markdown')

def in_shell(cell):
    "A cell of commands as a block of a shell, followed by its output; another cell as it is"
    lines = [line for line in cell.source.split('\n') if line and not line.startswith('#|')]
    if cell.cell_type != 'code' or not lines or not all(line.startswith('!') for line in lines): return [cell]
    cell.source = f'#| echo: false\n{cell.source}'
    commands = '\n'.join(continued(line.removeprefix('!')) for line in lines)
    return [mk_cell(fenced(commands, 'bash'), 'markdown'), cell]

class Tidy:
    """An nbdev processor: arguments as tables, in the order of definition; routine checks folded; names linked; files
    of the repository included; a link to Colab"""
    def __init__(self, nb): self.nb = nb

    def begin(self):
        page = Path(self.nb.path_).resolve().relative_to(NBS)
        if link := colab(page): self.nb.cells.insert(1, link)
        for cell in self.nb.cells:
            cell.source = INCLUDE.sub(lambda found: included(found[1], page.as_posix()), cell.source)
        module = module_of(Notebook(NBS/page))
        cells, run = [], []
        for cell in self.nb.cells:
            if module and (shown(cell) or 'code-fold: show' in cell.source): run.append(cell)
            else:
                cells += in_order(run, syntax(module)) + [cell] if run else [cell]
                run = []
        cells += in_order(run, syntax(module)) if run else []
        self.nb.cells = [part for c in cells if self.tidy(c, module) for part in in_shell(c)]
        for cell in self.nb.cells:
            if cell.cell_type == 'markdown': cell.source = link_names(cell.source, page.as_posix())
        if module == 'dreamplus.all':
            self.nb.cells.append(mk_cell(f'## All public names\n\n{name_index()}', 'markdown'))

    def tidy(self, cell, module):
        "Change a cell; False if it is to go"
        if name := shown(cell):
            if not (text := reference(module, name)): return False
            cell.update(cell_type='markdown', source=text, metadata={})
            for key in ('outputs', 'execution_count', 'has_sd'): cell.pop(key, None)
        if cell.cell_type == 'markdown': cell.source = unbroken(wrapped(cell.source))
        for out in cell.get('outputs', []):
            if 'text' in out and (commands := shell_block(''.join(out.text))):
                del out['text'], out['name']
                out.update(output_type='display_data', data={'text/markdown': commands}, metadata={})
            if 'text/markdown' in out.get('data', {}):
                text = re.sub(r'(?<=\d) ± ', '\u00a0±\u00a0', ''.join(out.data['text/markdown']))
                out.data['text/markdown'] = unbroken(wrapped(text))
        printed = [out for out in cell.get('outputs', []) if 'text' in out and not PROGRAM.search(''.join(out.text))]
        if any(COLUMNS.search(''.join(out.text)) for out in printed): # a table of text scrolls; its notes wrap
            for out in printed: out.text = '\n'.join(map(fill, ''.join(out.text).split('\n')))
            cell.source = f'#| classes: aligned\n{cell.source}'
        elif any(shown_width(out) > 560 for out in cell.get('outputs', [])): # pixels; scrolls on a phone
            cell.source = f'#| classes: wide\n{cell.source}'
        for out in cell.get('outputs', []):
            if 'text' in out and 'classes: aligned' not in cell.source and OPTION.search(''.join(out.text)):
                html = whole_options(''.join(out.text))
                out.update(output_type='display_data', data={'text/html': html}, metadata={})
                del out['text'], out['name']
        if cell.cell_type == 'code' and checks_only(cell.source) and not cell.get('outputs'):
            cell.source = f'#| code-fold: true\n#| code-summary: "Check"\n{cell.source}'
        return True

BODY = re.compile(r'(?<=\|\n)( *\|[-| :]+\|\n)((?: *\|.*\|(?:\n|$))+)') # of a table: its rule, its rows
CODE = re.compile(r'```.*?```|^#.*?$|`[^`\n]+`', re.S | re.M)

def unbroken(text):
    "Markdown whose options and short cells of tables stay on one line: a browser breaks lines at hyphens"
    def kept(text): return f'<span class="unbroken">{text}</span>'
    def code(found):
        if re.fullmatch(r'`(?:[^`]{,14}-[^`]{,14}|--[\w-]{,24})`', found[0]): return kept(found[0])
        if not re.match(r'`[^`]* --', found[0]): return found[0]
        parts = re.split(r'(--[\w-]+(?: "[^"]*"| [^\s-]\S*)?)', escape(found[0].strip('`'), quote=False))
        parts = [part.replace('-', '&#45;') for part in parts] # two hyphens would become a dash
        parts[1::2] = [kept(part) if len(part) < 36 + 8*part.count('&') else part for part in parts[1::2]]
        return f'<code>{"".join(parts)}</code>'
    def cell(found, numbers):
        text = found[0].strip()
        plain = not re.search(r'[<`$\[]', text)
        most = 24 if re.match(r'[-+±(\d]', text) else 20 # of a number with its interval, of names
        if numbers and plain and len(text) <= most and re.search('[ -]', text): return kept(text)
        long = len(re.sub(r'<[^>]*>|\]\([^)]*\)', '', text)) > 24
        if plain and len(text) < 200:
            text = re.sub(r'[\w+]+(?:-[\w+]+)+', lambda word: kept(word[0]), text)
        return f'<span class="words">{text}</span>' if long else text
    def row(line):
        return re.sub(r'(?<=\| )[^|]+(?= \|)', lambda found: cell(found, re.search(r'\d', line)), line)
    def body(found): return found[1] + '\n'.join(map(row, found[2].split('\n')))
    return BODY.sub(body, CODE.sub(code, text))

COMMAND = re.compile(r'!?(?:[A-Z_]+=\S+ )*(?:dreamplus|torchrun|python -m) ')

def continued(line, width=90):
    "A command, continued on further lines before its options if it is long; its comment comes first"
    command, mark, comment = (part.rstrip() for part in re.match(r'(.*?)( +# |$)(.*)', line).groups())
    if len(line) <= width or not COMMAND.match(command): return line
    lines = ['']
    for part in re.split(r'(?= --| && )', command):
        if lines[-1] and len(lines[-1] + part) > width - 2: lines.append('   ')
        lines[-1] += part
    return '\n'.join([f'# {comment}']*bool(mark) + [' \\\n'.join(lines)])

def wrapped(text):
    "Markdown whose long commands are continued on further lines"
    def block(found): return '\n'.join(map(continued, found[0].split('\n')))
    return re.sub(r'(?<=```bash\n).*?(?=```)', block, text, flags=re.S)

def shown_width(out):
    "The width in pixels at which a picture is shown; 0 for another output"
    kind = next((kind for kind in out.get('data', {}) if kind in ('image/png', 'image/jpeg')), None)
    if not kind: return 0
    width = out.metadata.get(kind, {}).get('width')
    return width or Image.open(BytesIO(base64.b64decode(''.join(out.data[kind])))).width

def shell_block(text):
    "A block of code of printed commands; None if anything else was printed"
    lines = [line for line in text.split('\n') if line]
    return fenced('\n'.join(lines), 'bash') if lines and all(map(COMMAND.match, lines)) else None

OPTION = re.compile(r'(?<![\w-])--[a-z][\w-]*(?: \w+=[^\s)]+)?')

def whole_options(text):
    "Printed text as HTML that does not break options at their hyphens"
    text = OPTION.sub(r'<span class="unbroken">\g<0></span>', escape(text.rstrip(), quote=False))
    return f'<pre class="printed"><code>{text}</code></pre>'

PROGRAM = re.compile(r'^import \w+$', re.M) # printed code, which line breaks would change
COLUMNS = re.compile(r'\S {2,}\S')

def fill(line, width=90):
    "A printed line, wrapped unless it has columns"
    return line if COLUMNS.search(line) else '\n'.join(
        wrap(line, width, subsequent_indent='  ', break_on_hyphens=False)) or line

def checks_only(source):
    "Whether every statement of a cell is a call of `test_...`"
    try: body = ast.parse(source).body
    except SyntaxError: return False
    calls = [getattr(getattr(node, 'value', None), 'func', None) for node in body if isinstance(node, ast.Expr)]
    return bool(body) and len(calls) == len(body) and all(getattr(c, 'id', '').startswith('test_') for c in calls)

# A preview

def process(page):
    "A notebook as `nbdev_docs` hands it to Quarto"
    nb = read_nb(page.path)
    FilterDefaults()(nb)
    return reads(nb2str(nb))

def options(source):
    "The options of a cell for Quarto: {'echo': 'false'}"
    return dict(re.findall(r'^#\| *([\w-]+): *"?(.*?)"?$', source, re.M))

def fenced(text, language=''): return f'```{language}\n{text.rstrip()}\n```'

def output(out, alt):
    "An output of a cell as Markdown"
    if 'text' in out: return fenced(out.text)
    for kind, data in out.get('data', {}).items():
        if kind.startswith('image/'):
            given = out.metadata.get(kind, {}).get('alt', alt)
            return f'<p><img src="data:{kind};base64,{data.strip()}" alt="{escape(given)}"></p>'
        if kind in ('text/markdown', 'text/html'): return data
    return fenced(out.data['text/plain']) if out.get('data') else ''

def markdown(cell):
    "A processed cell as Markdown, without the syntax that only Quarto knows"
    if cell.cell_type == 'markdown':
        text = re.sub(r'\[(\w+)\]\(([^)]*)\)\{\.(\w+)\}', r'<a class="\3" href="\2">\1</a>', cell.source)
        text = re.sub(r'^::: *\{\.([\w-]+)\}$', r'<div class="\1">\n', text, flags=re.M)
        return re.sub(r'^:::$', '\n</div>', text, flags=re.M)
    given, code = options(cell.source), re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    parts = [] if given.get('echo') == 'false' or not code.strip() else [fenced(code, 'python')]
    if given.get('code-fold') == 'true':
        parts = [f'<details><summary>{given["code-summary"]}</summary>', *parts, '</details>']
    parts += [output(out, given.get('fig-alt', '')) for out in cell.outputs]
    return '\n\n'.join([f'<div class="cell {given["classes"]}">', *parts, '</div>'] if 'classes' in given else parts)

class Renderer(IPythonRenderer):
    "Colours of code are Quarto's, and would take most of the time"
    def block_code(self, code, info=None): return f'<pre><code>{escape(code)}</code></pre>\n'

def markdown2html(text): return MarkdownWithMath(renderer=Renderer(escape=False)).render(text)

def identifier(heading):
    "The anchor that Quarto gives a heading"
    text = re.sub(r'[^\w\s.-]', '', re.sub(r'<[^>]*>', '', heading)).strip().lower()
    return re.sub(r'\s+', '-', re.sub(r'^[^a-z]+', '', text)) or 'section'

def with_anchors(html):
    "HTML whose headings have the anchors of Quarto; equal ones are numbered"
    seen = Counter()
    def heading(found):
        anchor = identifier(found[2])
        number = f'-{seen[anchor]}' if seen[anchor] else ''
        seen[anchor] += 1
        return f'<h{found[1]} id="{anchor}{number}">{found[2]}</h{found[1]}>'
    return re.sub(r'<h(\d)[^>]*>(.*?)</h\1>', heading, html, flags=re.S)

def render(nb):
    "A processed notebook as HTML: title, subtitle, cells; links between notebooks lead to their pages"
    front = yaml.safe_load(nb.cells[0].source.strip().strip('-'))
    html = markdown2html('\n\n'.join(markdown(c) for c in nb.cells[1:]))
    html = re.sub(r'<a class="anchor-link".*?</a>', '', html)
    html = with_anchors(html)
    html = re.sub(r'href="(?!\w+:)([^"#]+\.ipynb)', lambda m: f'href="{html_name(m[1])}', html)
    return f'<h1>{front["title"]}</h1>\n<div class="lead">{markdown2html(front["description"])}</div>\n{html}'

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="{up}images/favicon.svg">
<link rel="stylesheet" href="{up}styles.css">
<style>body {{ font: 17px/1.5 sans-serif; margin: 0; }} pre, code {{ font-size: 14px; }}
pre {{ background: #f6f7f8; padding: .6rem; }}
.page {{ display: flex; gap: 2rem; max-width: 1200px; margin: auto; padding: 1rem; }}
nav {{ flex: 0 0 240px; font-size: .85rem; }} main {{ flex: 1; min-width: 0; max-width: 900px; }}
td, th {{ border-top: 1px solid #ccc; padding: .25rem .5rem; text-align: left; vertical-align: top; }}
@media (max-width: 800px) {{ .page {{ flex-direction: column-reverse; }} }}</style></head>
<body><div class="page"><nav>{nav}</nav><main>{body}</main></div></body></html>"""

def preview(folder):
    "Write all pages into a folder, with the sidebar of `_quarto.yml`"
    sections = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    bodies = {page.name: render(process(page)) for page in PAGES}
    titles = {name: re.search('<h1>(.*?)</h1>', html)[1] for name, html in bodies.items()}
    for name, body in bodies.items():
        up = '../'*name.count('/')
        entries = [f'<p><b>{s["section"]}</b><br>' + '<br>'.join(
            f'<a href="{up}{html_name(page)}">{titles[page]}</a>' for page in s['contents']) + '</p>'
            for s in sections if 'section' in s]
        path = folder/html_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGE.format(title=titles[name], up=up, nav='\n'.join(entries), body=body), encoding='utf-8')
    shutil.copytree(NBS/'images', folder/'images', dirs_exist_ok=True)
    shutil.copy(NBS/'styles.css', folder)

if __name__ == '__main__':
    target = Path(sys.argv[1]).resolve()
    with chdir(NBS): preview(target) # whose settings.ini nbdev reads
