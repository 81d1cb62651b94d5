"""Processes that a test may kill. They are forked from a server that has imported the package and computed nothing,
so that one begins in milliseconds and is otherwise like any other.
"""
import gc
import importlib
import io
import multiprocessing
import os
import sys
import traceback
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout

from notebooks import ROOT

from dreamplus.cli import main

os.environ.setdefault('OMP_WAIT_POLICY', 'passive') # threads that wait leave the cores to others
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['tests.preloaded'])

class Process:
    "`f(*args)` in a process of its own, begun at once"
    def __init__(self, f, *args, threads=1):
        self.answers, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_call, args=(theirs, threads, f, args), daemon=True)
        with chdir(ROOT): self.process.start() # the first one starts the server, which finds its modules there
        self.pid = self.process.pid
        theirs.close()

    def answer(self):
        "What `f` sends first, or None if it dies before"
        try: return self.answers.recv()
        except EOFError: return None

    def end(self):
        "What `f` returned, and the exit status: minus the signal, where one killed it"
        answer = self.answer()
        self.process.join(60)
        return answer, self.process.exitcode

def _call(pipe, threads, f, args):
    import torch
    gc.freeze() # collections of garbage pass over what was there before
    torch.set_num_threads(threads)
    torch.seed() # a run depends on its own seed only
    pipe.send(f(*args))

def command(folder, *argv):
    "What a shell in `folder` would see of `dreamplus *argv`: exit status, stdout, stderr"
    os.chdir(folder)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err: status = main([*map(str, argv)])
    return status, out.getvalue(), err.getvalue()

def forked(code, folder, **env):
    """Exit status and output of `code` in a fork of this process, which works in `folder` and imports `dreamplus` anew;
    torch is there already, which takes seconds to import"""
    said = folder/'said.txt'
    if not (child := os.fork()):
        status, sys.stdout = 1, open(said, 'w') # noqa: SIM115
        sys.stderr = sys.stdout
        try:
            os.chdir(folder)
            os.environ |= env
            importlib.reload(warnings).resetwarnings() # pytest records them
            for kind in DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning:
                warnings.simplefilter('ignore', kind) # as Python does
            for name in [m for m in sys.modules if m.split('.')[0] == 'dreamplus']: del sys.modules[name]
            exec(code, {'__name__': '__main__'}) # noqa: S102
            status = 0
        except BaseException: traceback.print_exc()
        finally: sys.stdout.flush(), os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()
