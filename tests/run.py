"""Every check of the project: the notebooks (`nbdev_test`) and two halves of the tests, side by side. Arguments go to
pytest.

One thread each: two cores are the least we promise, and more on a larger machine would change sums in the last bit.
The `MALLOC` settings let glibc reuse big activations instead of handing them back to the kernel at every step.
"""
import gc
import os
import sys
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DEFAULTS = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg', PYTHONUNBUFFERED='1',
                MALLOC_MMAP_THRESHOLD_='8589934592', MALLOC_TRIM_THRESHOLD_='17179869184',
                MALLOC_TOP_PAD_='268435456')

PATH = f'{BIN}{os.pathsep}{os.environ["PATH"]}'

def started(f, *args, cache, log=None):
    "A fork of this process that calls `f(*args)` with a cache of its own, and writes what it says into `log`"
    if child := os.fork(): return child
    status = 1
    try:
        os.environ['DREAMPLUS_CACHE'] = str(cache)
        if log: os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        status = f(*args)
    except BaseException: traceback.print_exc()
    finally: sys.stdout.flush(), sys.stderr.flush(), os._exit(int(status or 0))

def ended(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def pages():
    """`nbdev_test` in this process. Each page begins with the environment of the first, and collections of garbage
    pass over what was there before it"""
    import nbdev.test # not fastai, which changes what `test_eq` compares
    test, env = nbdev.test.test_nb, dict(os.environ)
    def alone(*args, **kw):
        gc.collect(), gc.freeze()
        os.environ.clear(), os.environ.update(env)
        return test(*args, **kw)
    nbdev.test.test_nb = alone
    try: nbdev.test.nbdev_test(n_workers=0, do_print=True, timing=True)
    except SystemExit as e: return e.code

def tests(*args):
    import pytest
    return pytest.main([*sys.argv[1:], *args])

# the tests that start processes and wait for them (one server forks these), to leave a core to the others meanwhile
WAITING = [f'tests/test_{name}.py' for name in (
    'campaign', 'classes', 'compare', 'continual', 'evaluate', 'fast', 'helpers', 'imagenet', 'package', 'parallel',
    'resume', 'trajectory', 'windows')]

def main():
    import matplotlib.pyplot # noqa: F401
    import torch._dynamo # noqa: F401
    import torchvision # noqa: F401
    halves = WAITING, ['tests', *(f'--ignore={f}' for f in WAITING)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        logs = [opened.enter_context(open(Path(folder)/f'{i}.log', 'w+')) for i in range(2)]
        both = [started(tests, *half, cache=f'{log.name}-cache', log=log) for log, half in zip(logs, halves)]
        print('== notebooks', flush=True)
        failed = ended(started(pages, cache=Path(folder)/'pages'))
        if failed: print(f'== notebooks FAILED with exit status {failed}', flush=True)
        statuses = [ended(child) for child in both]
        for _, log in sorted(zip(statuses, logs), key=lambda pair: pair[0] > 0): # a half that failed comes last
            log.seek(0)
            print('== tests', log.read(), sep='\n', end='', flush=True)
    sys.exit(bool(failed or any(statuses)))

if __name__ == '__main__':
    if not DEFAULTS.keys() <= os.environ.keys(): # they hold from the start of a process
        os.execve(sys.executable, [sys.executable, *sys.argv], DEFAULTS | os.environ | dict(PATH=PATH))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    main()
