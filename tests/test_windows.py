"The default path on a system without what only POSIX has, as on Windows."
from processes import forked

HIDE = """
import builtins, ctypes, os, pathlib, signal, sys
import fastai.learner, sklearn.datasets, torch # are made for the system that they run on
for name in [m for m in sys.modules if m.startswith('filelock')]: del sys.modules[name]
for name in 'resource', 'fcntl', 'pwd', 'grp', 'termios': sys.modules[name] = None
for name in ('sysconf', 'fork', 'getuid', 'geteuid', 'uname', 'mkfifo', 'sched_getaffinity', 'statvfs', 'getloadavg',
             'fchmod', 'killpg'):
    if hasattr(os, name): delattr(os, name)
for name in 'SIGKILL', 'SIGHUP', 'SIGALRM', 'SIGUSR1', 'SIGPIPE': delattr(signal, name)
read, opened, library = pathlib.Path.read_text, builtins.open, ctypes.CDLL
def no_proc(path):
    if str(path).startswith('/proc'): raise FileNotFoundError(2, 'No such file', str(path))
def read_text(self, *args, **kw): no_proc(self); return read(self, *args, **kw)
def open_file(path, *args, **kw): no_proc(path); return opened(path, *args, **kw)
class Library(library):
    def __init__(self, name=None, *args, **kw):
        if name is None: raise TypeError('on Windows, a name is needed')
        super().__init__(name, *args, **kw)
pathlib.Path.read_text, builtins.open, ctypes.CDLL = read_text, open_file, Library
"""
RUN = """
import torch
torch.set_num_threads(1)
from dreamplus.cli import main
def run(*args):
    if status := main(list(args)): raise SystemExit(f'{args}: {status}')
run('distill', 'digits', '--method', 'dream+', '--ipc', '1', '--width', '4', '--steps', '2', '--nets', '0',
    '--out', 'run', '--set', 'warm_epochs=0', '--set', 'n_data=8')
from dreamplus.core import toy_images
from dreamplus.data.sources import load_data
from dreamplus.distilled import load_distilled
from dreamplus.judge.evaluate import score
from dreamplus.machine import memory_bytes, peak_mib
score(load_distilled('run'), load_data(), n=1, rows=('distilled', 'random'), epochs=0, steps=2)
x, y = toy_images(2, 6, 8)
assert load_data((x, y.flip(0)), valid=.2).device.type == 'cpu'
assert (memory_bytes(), peak_mib(torch.device('cpu'))) == (8*2**30, 0)
print('all done')
"""

def test_without_what_only_posix_has(tmp_path):
    status, said = forked(HIDE + RUN, tmp_path, DREAMPLUS_CACHE=str(tmp_path/'cache'))
    assert status == 0 and said.endswith('all done\n'), said
    assert [*(tmp_path/'cache'/'baselines').iterdir()]
