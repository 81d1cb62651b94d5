"""`README.md` is `nbs/index.ipynb` rendered by nbconvert; `python tests/readme.py --write` renders it anew.

Hidden cells, directives and the code of `echo: false` go; links, written relative to `nbs/`, become relative to the
repository. Pictures are links to files under `nbs/images/`: a picture in a cell's output would be a second copy of such
a file, and is refused.
"""
import posixpath
import re
import sys

import nbformat
from nbconvert import MarkdownExporter
from notebooks import LINK, NBS, ROOT, body, directives

def relink(found): return found[1] + posixpath.normpath(f'nbs/{found[2]}') if found[2] else found[0]

def render():
    nb = nbformat.read(NBS/'index.ipynb', as_version=4)
    nb.metadata.language_info = dict(name='python') # which nbdev_clean takes away, and code is coloured by
    nb.cells = [c for c in nb.cells if c.cell_type == 'markdown' or not directives(c.source) & {'hide', 'default_exp'}]
    for cell in nb.cells:
        if 'echo' in directives(cell.source): # a table drawn from records; its code stays in the notebook
            cell.update(cell_type='markdown', source='\n'.join(''.join(o.data['text/markdown']) for o in cell.outputs))
        if cell.cell_type == 'markdown': cell.source = LINK.sub(relink, cell.source)
        else:
            cell.source = body(cell.source)
            if any(kind.startswith('image/') for out in cell.outputs for kind in out.get('data', {})):
                raise ValueError(f'index.ipynb: save the picture under nbs/images/ and link to it:\n{cell.source}')
    text = MarkdownExporter().from_notebook_node(nb)[0]
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip() + '\n'

if __name__ == '__main__':
    if '--write' in sys.argv: (ROOT/'README.md').write_text(render(), encoding='utf-8')
    else: sys.stdout.write(render())
