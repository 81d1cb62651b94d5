"""Accuracies of several networks trained on distilled sets, and on as many random images.

    python -m benchmarks.networks cifar10-jpeg RUN,RUN --root FOLDER --archs mlp,alexnet,vgg11,resnet10

A RUN is a run folder or a saved set. The record is written after each network.
"""
from dreamplus.core import write_json
from dreamplus.data.sources import load_data
from dreamplus.distilled import load_distilled
from dreamplus.judge.scores import cross
from dreamplus.machine import keep_memory

from . import head, make_parser

KEYS = 'method', 'ipc', 'factor', 'arch', 'set', 'accs'

def main():
    parser = make_parser('benchmarks.networks', __doc__, 'networks.json')
    parser.add_argument('data', help='as in `dreamplus distill`')
    parser.add_argument('sets', help='run folders or saved sets, separated by commas')
    parser.add_argument('--root', help='folder of the data')
    parser.add_argument('--archs', default='convnet,mlp,alexnet,vgg11,resnet10', help='networks')
    parser.add_argument('--nets', type=int, default=2, help='networks for each accuracy [2]')
    a = parser.parse_args()
    data = load_data(a.data, **dict(root=a.root) if a.root else {})
    dsets = [load_distilled(path) for path in a.sets.split(',')]
    keep_memory()
    record, rows = head({data.name: data.digest}, [*range(a.nets)]) | dict(nets=a.nets), []
    for arch in a.archs.split(','):
        for dset in dsets:
            rows += cross([dset], data, (arch,), n=a.nets, rows=('distilled', 'random'), log=print)
            write_json(a.out, record | dict(rows=[{k: r[k] for k in KEYS} for r in rows]))

if __name__ == '__main__': main()
