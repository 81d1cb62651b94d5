"""`nbs/images/gallery-ipc*.png`, the pictures of the gallery, from the runs of `results/best-cifar10-jpeg-*`:

    python results/gallery.py cifar10-jpeg RUN RUN

The commands of these records write the run folders; those of seed 0 are drawn.

One column for each class: 2 random real images of the training split, then decoded images of seed 0.
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from dreamplus.choose.coresets import coreset
from dreamplus.core import Key
from dreamplus.data.core import image_grid, to_float
from dreamplus.data.sources import load_data
from dreamplus.distilled import load_distilled

HERE = Path(__file__).parent
ROWS = {1: 4, 10: 5} # ipc: decoded images of each class that are shown

def rows(x, n): # (C,n,ch,h,w) -> (n,C,ch,h,w), spread over the images
    return x[:, [i*x.shape[1]//n for i in range(n)]].transpose(0, 1)

def draw(data, dset):
    "One picture"
    ipc = int(dset.ipc)
    n = ROWS[ipc]
    real = to_float(data.train.x[coreset('random', data, 2, None, key=Key(0, 'gallery'))])
    parts = [real.transpose(0, 1), rows(dset.images().unflatten(0, (data.n_classes, -1)), n)]
    fig, axs = plt.subplots(2, 1, figsize=(10, n + 2.9), height_ratios=[2, n])
    for ax, x, title in zip(axs, parts, ('real', f'distilled, ipc {ipc}: {n} of {dset.factor**2*ipc} decoded images')):
        ax.imshow(image_grid(x, cell=96), cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        ax.set_title(title, fontsize=14, loc='left', pad=26 if ax is axs[0] else 6)
        ax.axis('off')
    side = image_grid(parts[0], cell=96).shape[1]/data.n_classes
    for c, name in enumerate(data.classes): axs[0].text(side*(c + .5), -6, name, ha='center', fontsize=14)
    fig.subplots_adjust(left=0, right=1, bottom=0, top=1 - .55/(n + 2.9), hspace=.7/(n + 2))
    fig.savefig(HERE.parent/'nbs'/'images'/f'gallery-ipc{ipc}.png', dpi=100)

data = load_data(sys.argv[1])
for run in sys.argv[2:]: draw(data, load_distilled(run))
