"""`nbs/images/overview.png`, the picture of the README, from `results/best-digits-ipc1`:

    python results/overview.py

One real image of each class drawn at random, the k-means choice, and the distilled one of seed 0. Beside each of them
stands its accuracy from the record.
"""
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from dreamplus.choose.coresets import coreset
from dreamplus.core import Key
from dreamplus.data.core import image_grid, to_float
from dreamplus.data.sources import load_data
from dreamplus.distilled import load_distilled
from dreamplus.judge.protocols import protocol_args, train_fresh
from dreamplus.labs.study import load_study

folder = Path(__file__).parent/'best-digits-ipc1'
[record] = load_study(folder, seed=0)
data, dset = load_data('digits'), load_distilled(folder)
p = protocol_args('quick', dset.evaluation, data.name, len(data.train)/data.n_classes, data.n_classes)
chooser = train_fresh(data.train.x, data.train.y, data, dset.evaluation, p, record['seed'])
images = {}
for name in 'random', 'k-means': # (C,1,ch,h,w)
    images[name] = to_float(data.train.x[coreset(name, data, 1, chooser, key=Key(0, name))])
images['distilled'] = dset.pixels.unflatten(0, (data.n_classes, -1))[:, :1]
fig, axs = plt.subplots(3, 1, figsize=(8.4, 3.1))
for ax, (name, x) in zip(axs, images.items()):
    acc = next(row['acc'] for row in record['rows'] if row['set'] == name)
    ax.imshow(image_grid(x.transpose(0, 1), cell=56), cmap='gray', vmin=0, vmax=255)
    ax.axis('off')
    ax.text(-.01, .5, name, transform=ax.transAxes, ha='right', va='center', fontsize=12)
    ax.text(1.01, .5, f'{100*acc:.1f} %', transform=ax.transAxes, ha='left', va='center', fontsize=13)
fig.subplots_adjust(left=.11, right=.91, top=1, bottom=0, hspace=.02)
fig.savefig(Path(__file__).parents[1]/'nbs'/'images'/'overview.png', dpi=110)
