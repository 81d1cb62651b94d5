"""Folders of images on which no choice of `best` was made, to check its rule for unknown data:

    python -m benchmarks.unseen CIFAR10 FOLDER
    dreamplus compare FOLDER/kinds --methods best,dream+ --ipc 10 --minutes 1 ...

`kinds` has 7 classes of unequal size, joined from the classes of CIFAR-10. `enlarged` has the scikit-learn digits at
32 px. CIFAR10 is a folder with `train` and `test`, each with one folder for each class.
"""
import argparse
from pathlib import Path

from torch.nn import functional as F
from torchvision.utils import save_image

from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data

KINDS = dict(aircraft='airplane', road='automobile truck', ship='ship', bird='bird', pet='cat dog',
             hoofed='deer horse', frog='frog')
EACH = dict(train=1000, test=500) # images of a class of CIFAR-10

def join_kinds(cifar, folder):
    "Links to the first images of each class, in the folder of its kind"
    for part, n in EACH.items():
        for kind, names in KINDS.items():
            (folder/part/kind).mkdir(parents=True, exist_ok=True)
            for name in names.split():
                for path in sorted((cifar/part/name).iterdir())[:n]:
                    (folder/part/kind/f'{name}-{path.name}').symlink_to(path.resolve())

def enlarge_digits(folder):
    "The digits at 32 pixels, as PNG files"
    data = load_data('digits')
    for part, split in dict(train=data.train, test=data.test).items():
        images = F.interpolate(to_float(split.x), (32, 32), mode='bilinear')
        for i, (x, y) in enumerate(zip(images, split.y.tolist())):
            path = folder/part/f'digit {y}'/f'{i:04}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(x, path)

def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.unseen', description=__doc__)
    parser.add_argument('cifar10', type=Path, help='folder of CIFAR-10 as images')
    parser.add_argument('folder', type=Path, help='where the new folders are made')
    a = parser.parse_args()
    join_kinds(a.cifar10, a.folder/'kinds')
    enlarge_digits(a.folder/'enlarged')

if __name__ == '__main__': main()
