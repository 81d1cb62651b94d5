"""Every check of the project: the notebooks (`nbdev_test`) and the tests, side by side. Arguments go to pytest.

One thread each: two cores are the least we promise, and more on a larger machine would change sums in the last bit.
The `MALLOC` settings let glibc reuse big activations instead of handing them back to the kernel at every step.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DEFAULTS = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg', PYTHONUNBUFFERED='1',
                MALLOC_MMAP_THRESHOLD_='8589934592', MALLOC_TRIM_THRESHOLD_='17179869184',
                MALLOC_TOP_PAD_='268435456')

def start(cache, out, *command):
    env = DEFAULTS | os.environ | dict(PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}', DREAMPLUS_CACHE=str(cache))
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out and subprocess.STDOUT)

# `nbdev_test` in one process, which imports torch once; collections of garbage pass over torch's million objects
PAGES = """
import gc, torch._dynamo, torchvision, matplotlib.pyplot # not fastai, which changes what `test_eq` compares
gc.freeze()
from nbdev.test import nbdev_test
nbdev_test(n_workers=0, do_print=True, timing=True)
"""
# after the notebooks, so that both processes end at about the same time
LATER = [f'tests/test_{name}.py' for name in ('callbacks', 'compare', 'study', 'trajectory', 'windows', 'zoo')]

def main():
    pytest = sys.executable, '-m', 'pytest', *sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder)/'tests.log', 'w+') as log:
        tests = start(Path(folder)/'tests', log, *pytest, 'tests', *(f'--ignore={f}' for f in LATER))
        print('== notebooks', flush=True)
        pages = start(Path(folder)/'pages', None, sys.executable, '-c', PAGES).wait()
        if pages: print(f'== notebooks FAILED with exit status {pages}', flush=True)
        later = start(Path(folder)/'pages', None, *pytest, *LATER).wait()
        failed = tests.wait() or later
        log.seek(0)
        print('== tests', log.read(), sep='\n', end='', flush=True)
    sys.exit(bool(pages or failed))

if __name__ == '__main__': main()
