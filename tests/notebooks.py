"What the tests ask of a notebook."
import ast
import json
import re
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
EXPORTS = {'export', 'exports', 'exporti'}
# code first, so that nothing inside it is taken for a link; group 2 is the target of a link within the repository
LINK = re.compile(r'```.*?```|`[^`\n]*`|(\]\(|(?:src|href)=")(?!\w+:|[#/])([^)\s"]+)', re.S)

def links(markdown):
    "The files that `markdown` links to, as it names them"
    return [m[2].split('#')[0] for m in LINK.finditer(markdown) if m[2]]

def directives(source):
    "The words after `#|` in a cell: {'export', 'hide', ...}"
    return {m[1] for m in re.finditer(r'^#\|\s*(\w+)', source, re.M)}

def body(source):
    "A cell without its directives"
    return '\n'.join(line for line in source.split('\n') if not line.startswith('#|')).strip('\n')

def definitions(source):
    "The functions, classes and assigned names at the top of a cell, by name"
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
    return found

class Notebook:
    def __init__(self, path):
        self.path, self.name = path, path.relative_to(NBS).as_posix()
        without_pictures = lambda pairs: {k: v for k, v in pairs if not k.startswith('image/')}
        self.cells = json.loads(path.read_text(encoding='utf-8'), object_pairs_hook=without_pictures)['cells']
        for cell in self.cells: cell['source'] = ''.join(cell['source'])
        self.prose = [c['source'] for c in self.cells if c['cell_type'] == 'markdown']
        self.code = [c['source'] for c in self.cells if c['cell_type'] == 'code']
        self.exported = [body(s) for s in self.code if directives(s) & EXPORTS]
        self.visible = [body(s) for s in self.code if not directives(s) & (EXPORTS | {'hide'})]

    def __repr__(self): return self.name

    @cached_property
    def module(self):
        "The file it exports, or None"
        found = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(self.code), re.M)
        return found and ROOT/'dreamplus'/(found[1].replace('.', '/') + '.py')

    @cached_property
    def public(self):
        "`__all__` of the module"
        if not self.module: return []
        assigns = [n for n in ast.parse(self.module.read_text(encoding='utf-8')).body if isinstance(n, ast.Assign)]
        return next(ast.literal_eval(n.value) for n in assigns if getattr(n.targets[0], 'id', '') == '__all__')

    @cached_property
    def used(self):
        "Every name and attribute in the cells a reader sees as examples"
        lines = [line for s in self.visible for line in s.split('\n') if not line.lstrip().startswith(('!', '%'))]
        return {getattr(n, 'id', getattr(n, 'attr', None)) for n in ast.walk(ast.parse('\n'.join(lines)))}

    @cached_property
    def ideas(self):
        "For each exported cell that defines something: its names, and whether the next code cell is an example of them"
        found = []
        for cell, after in zip(self.code, [*self.code[1:], '']):
            if not directives(cell) & EXPORTS or not (names := [*definitions(body(cell))]): continue
            example = not directives(after) & EXPORTS
            found.append((names, example and any(re.search(rf'(?<!\w){re.escape(n)}(?!\w)', after) for n in names)))
        return found

PAGES = [Notebook(p) for p in sorted(NBS.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
CHAPTERS = [nb for nb in PAGES if nb.name[0].isdigit()] # each stands on those before it
