"""Classes in one pass: seconds of an inner iteration of DREAM+ for several image sizes, and what the package chooses.

    python -m benchmarks.chunks

The images are random pixels in ten classes.
"""

from dreamplus.core import write_json
from dreamplus.machine import keep_memory, pick_device

from . import head, make_parser
from .__main__ import learner, seconds, target, toy

CHUNKS = 1, 2, 5, 10
REST = dict(channels=1, images=2000, ipc=1, factor=1, n_data=64, inner=10)
SHAPES = [dict(size=size, batch=batch, width=width) for size, batch, width in (
    (8, 8, 32), (8, 32, 32), (8, 32, 128), (16, 16, 32), (28, 8, 32), (8, 128, 32), (16, 64, 32), (16, 64, 128),
    (28, 32, 32), (28, 128, 32))]

def step(shape, device):
    "Seconds with each chunk, and the chunk without one given"
    learn = learner(toy(**shape | REST), device, **shape | REST)
    loss, to, match = learn.loss_func, target(learn), learn.loss_func.match
    chosen, times = match.chunk, []
    for match.chunk in CHUNKS:
        times.append(seconds(lambda: loss(learn.model(to.classes.index), to).backward(), learn.data.device, 5))
    return dict(chosen=chosen, pixels=shape['batch']*shape['size']**2, seconds=dict(zip(map(str, CHUNKS), times)))

def main():
    parser = make_parser('benchmarks.chunks', __doc__, 'chunks.json')
    parser.add_argument('--device', default='cpu')
    a = parser.parse_args()
    keep_memory()
    sizes = {s['size'] for s in SHAPES}
    data = {f'{size} pixels': toy(size, REST['channels'], REST['images']).digest for size in sizes}
    record = head(data, [0], pick_device(a.device)) | dict(steps=[])
    for shape in SHAPES:
        record['steps'].append(shape | step(shape, pick_device(a.device)))
        print(record['steps'][-1], flush=True)
    write_json(a.out, record)

if __name__ == '__main__': main()
