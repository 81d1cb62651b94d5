"""`nbs/images/overview.png`, the picture of the README, from a run folder:

    python results/overview.py results/digits-ipc1-seed0

One real image of each class drawn at random, the k-means choice, and the distilled one; beside each row the accuracy
that the run's `result.json` holds.
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from dreamplus.core import open_run, read_json, seeded
from dreamplus.data.core import image_grid, to_float
from dreamplus.loop.distill import run_data
from dreamplus.distilled import load_distilled
from dreamplus.judge.protocols import protocol_args, train_fresh
from dreamplus.choose.kmeans import coreset

run = Path(sys.argv[1])
_, info = open_run(run)
data, dset, result = run_data(run, info), load_distilled(run), read_json(run/'result.json')
seed = info['seed']
p = protocol_args('quick', dset.evaluation, dataset=data.name, per_class=len(data.train)/data.n_classes)
chooser = train_fresh(data.train.x, data.train.y, data, dset.evaluation, p, seed)
with seeded(seed):
    picks = {name: to_float(data.train.x[coreset(name, data, 1, chooser)]) for name in ('random', 'k-means')}
rows = {'random': picks['random'], 'k-means': picks['k-means'], 'distilled': dset.pixels[:, :1]}
fig, axs = plt.subplots(3, 1, figsize=(8.4, 3.1))
for ax, (name, x) in zip(axs, rows.items()):
    row = next(r for r in result['rows'] if r['set'] == name)
    ax.imshow(image_grid(x.transpose(0, 1), cell=56), cmap='gray', vmin=0, vmax=255)
    ax.axis('off')
    ax.text(-.01, .5, name, transform=ax.transAxes, ha='right', va='center', fontsize=11)
    ax.text(1.01, .5, f'{100*row["acc"]:.1f} %', transform=ax.transAxes, ha='left', va='center', fontsize=13)
fig.subplots_adjust(left=.11, right=.91, top=1, bottom=0, hspace=.02)
out = Path(__file__).parents[1]/'nbs'/'images'/'overview.png'
out.parent.mkdir(exist_ok=True)
fig.savefig(out, dpi=110)
