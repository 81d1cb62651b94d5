"""Every check of the project: the notebooks (`nbdev_test`), then the tests. Arguments go to pytest.

Two threads, because two cores are the least we promise: more on a larger machine would change sums in the last bit.
Threads that wait sleep, because spinning ones take the cores from whatever else runs, up to twenty times over.
The `MALLOC` settings let glibc reuse big activations instead of handing them back to the kernel at every step.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DEFAULTS = dict(OMP_NUM_THREADS='2', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg', PYTHONUNBUFFERED='1',
                MALLOC_MMAP_THRESHOLD_='8589934592', MALLOC_TRIM_THRESHOLD_='17179869184',
                MALLOC_TOP_PAD_='268435456')

def run(title, *command):
    with tempfile.TemporaryDirectory() as cache:
        env = DEFAULTS | os.environ | dict(PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}', DREAMPLUS_CACHE=cache)
        print(f'== {title}', flush=True)
        return subprocess.run(command, cwd=ROOT, env=env).returncode

def main():
    # one process imports torch once, and on two cores is as fast as two that fight for them
    notebooks = run('notebooks', BIN/'nbdev_test', '--n_workers', '0', '--do_print', '--timing')
    if notebooks: print(f'== notebooks FAILED with exit status {notebooks}', flush=True)
    tests = run('tests', sys.executable, '-m', 'pytest', 'tests', *sys.argv[1:])
    sys.exit(bool(notebooks or tests))

if __name__ == '__main__': main()
