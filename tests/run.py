"""Every check of the project: the notebooks (`nbdev_test`) and two halves of the tests, side by side. Arguments go to
pytest.

One thread each: two cores are the least we promise, and more on a larger machine would change sums in the last bit.
The `MALLOC` settings let glibc reuse big activations instead of handing them back to the kernel at every step.
"""
import gc
import multiprocessing
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg', PYTHONUNBUFFERED='1',
                MALLOC_MMAP_THRESHOLD_='8589934592', MALLOC_TRIM_THRESHOLD_='17179869184',
                MALLOC_TOP_PAD_='268435456')
# the tests that start processes and wait for them (one server forks these), to leave a core to the others meanwhile
WAITING = [f'tests/test_{name}.py' for name in (
    'campaign', 'classes', 'compare', 'continual', 'evaluate', 'fast', 'helpers', 'imagenet', 'package', 'parallel',
    'resume', 'trajectory', 'windows')]

def notebooks():
    "`nbdev_test` in this process. Each page begins with the environment of the first"
    import nbdev.test
    from matplotlib_inline.config import InlineBackend
    InlineBackend.instance().print_figure_kwargs = dict(bbox_inches=None) # a figure is drawn once, not twice to crop it
    test, env = nbdev.test.test_nb, dict(os.environ)
    def alone(*args, **kw):
        gc.collect(), gc.freeze() # collections of garbage pass over what was there before
        os.environ.clear(), os.environ.update(env)
        return test(*args, **kw)
    nbdev.test.test_nb = alone
    nbdev.test.nbdev_test(n_workers=0, do_print=True, timing=True)

def tests(*args):
    import pytest
    sys.exit(pytest.main(['-p', 'no:logging', *args])) # which no test uses, and which takes 1 ms of each

def start(cache, log, f, *args):
    "Begin `f(*args)` in a fork of this process, which has imported what takes seconds"
    def run():
        os.environ['DREAMPLUS_CACHE'] = str(cache)
        if log: os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        f(*args)
    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    return process

def main():
    os.chdir(ROOT)
    if not DEFAULTS.keys() <= os.environ.keys(): # glibc reads them when a program starts
        os.execve(sys.executable, [sys.executable, *sys.argv], DEFAULTS | os.environ)
    os.environ['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    # not fastai, which changes what `test_eq` compares in the notebooks
    import matplotlib.pyplot # noqa: F401
    import sklearn.model_selection # noqa: F401
    import torch._dynamo # noqa: F401, which any optimiser imports
    import torchvision # noqa: F401
    gc.freeze()
    sys.path.insert(0, str(ROOT))
    halves = WAITING, ['tests', *(f'--ignore={f}' for f in WAITING)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        logs = [opened.enter_context(open(Path(folder)/f'{i}.log', 'w+')) for i in range(2)]
        running = [start(f'{log.name}-cache', log, tests, *sys.argv[1:], *half) for log, half in zip(logs, halves)]
        print('== notebooks', flush=True)
        pages = start(Path(folder)/'pages', None, notebooks)
        for process in pages, *running: process.join()
        if pages.exitcode: print(f'== notebooks FAILED with exit status {pages.exitcode}', flush=True)
        failed = [process.exitcode for process in running]
        for _, log in sorted(zip(failed, logs), key=lambda pair: pair[0] != 0): # a half that failed comes last
            log.seek(0)
            print('== tests', log.read(), sep='\n', end='', flush=True)
    sys.exit(bool(pages.exitcode or any(failed)))

if __name__ == '__main__': main()
