"""Every check of the project: the notebooks (`nbdev_test`) and two halves of the tests, side by side. Arguments go to
pytest.

One thread each: two cores are the least we promise, and more on a larger machine would change sums in the last bit.
The `MALLOC` settings let glibc reuse big activations instead of handing them back to the kernel at every step.
"""
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DEFAULTS = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg', PYTHONUNBUFFERED='1',
                MALLOC_MMAP_THRESHOLD_='8589934592', MALLOC_TRIM_THRESHOLD_='17179869184',
                MALLOC_TOP_PAD_='268435456')

def start(cache, out, *command):
    env = DEFAULTS | os.environ | dict(PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}', DREAMPLUS_CACHE=str(cache))
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out and subprocess.STDOUT)

# `nbdev_test` in one process, which imports torch once. Each page begins with the environment of the first, and
# collections of garbage pass over what was there before it
PAGES = """
import gc, os
import nbdev.test, torch._dynamo, torchvision, matplotlib.pyplot # not fastai, which changes what `test_eq` compares
test, env = nbdev.test.test_nb, dict(os.environ)
def alone(*args, **kw):
    gc.collect(), gc.freeze()
    os.environ.clear(), os.environ.update(env)
    return test(*args, **kw)
nbdev.test.test_nb = alone
nbdev.test.nbdev_test(n_workers=0, do_print=True, timing=True)
"""
# the tests that start processes and wait for them (one server forks these), to leave a core to the others meanwhile
WAITING = [f'tests/test_{name}.py' for name in (
    'campaign', 'classes', 'compare', 'continual', 'evaluate', 'helpers', 'imagenet', 'package', 'parallel',
    'resume', 'trajectory', 'windows')]

def main():
    pytest = sys.executable, '-m', 'pytest', *sys.argv[1:]
    halves = WAITING, ['tests', *(f'--ignore={f}' for f in WAITING)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        logs = [opened.enter_context(open(Path(folder)/f'{i}.log', 'w+')) for i in range(2)]
        tests = [start(f'{log.name}-cache', log, *pytest, *half) for log, half in zip(logs, halves)]
        print('== notebooks', flush=True)
        pages = start(Path(folder)/'pages', None, sys.executable, '-c', PAGES).wait()
        if pages: print(f'== notebooks FAILED with exit status {pages}', flush=True)
        failed = [process.wait() for process in tests]
        for _, log in sorted(zip(failed, logs), key=lambda pair: pair[0] > 0): # a half that failed comes last
            log.seek(0)
            print('== tests', log.read(), sep='\n', end='', flush=True)
    sys.exit(bool(pages or any(failed)))

if __name__ == '__main__': main()
