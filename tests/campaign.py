"""A seeded campaign against dreamplus: commands are killed, stopped, run side by side, and given wrong options, wrong
arguments, damaged files and odd data. Its table counts what went wrong, and its exit status is 1 if anything did.

    python -m tests.campaign --seconds 600 --seed 0             one process, one thread
    python -m tests.campaign --kinds files --first 17 --trials 1   one trial again
"""
import argparse
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent)) # as pytest does
from processes import Process, command  # noqa: E402

import dreamplus.all as dp  # noqa: E402
from dreamplus.arguments import arguments  # noqa: E402
from dreamplus.cli import COMMANDS, main  # noqa: E402
from dreamplus.core import load_state, toy_images, write_json  # noqa: E402
from dreamplus.data.core import fingerprint  # noqa: E402
from dreamplus.judge.protocols import PROTOCOLS  # noqa: E402
from dreamplus.labs.leaderboard import leaderboard  # noqa: E402
from dreamplus.machine import hardware, versions  # noqa: E402
from dreamplus.options import make_parser  # noqa: E402
from dreamplus.parts import all_parts  # noqa: E402
from dreamplus.tables import markdown_table  # noqa: E402

FAULTS = 'tracebacks', 'wrong exit statuses', 'leftovers', 'hangs', 'unequal results', 'messages without file or remedy'
LIMIT = 120 # seconds that a trial may take; others may use the machine too
KINDS = {} # name -> function of a World and a Random; raises or returns nothing

def kind(f): KINDS[f.__name__.replace('_', ' ')] = f; return f

class Fault(Exception):
    "What a trial has found: one of FAULTS, and the circumstances"

def fault(which, *said): raise Fault(which, ' '.join(map(str, said)))

# Where trials take place

QUICK = dict(epochs=1, steps=2) # the protocol of the campaign
TOYS = '--method idc --outer 2 --inner 2 --width 4 --set n_data=8 --set net_batch=4 --set batch_real=4 --set report=2'
MAKE = { # folder -> the command that makes it, in a folder with toys/; those that a kill may hit
    'run': f'distill toys {TOYS} --nets 1 --checkpoint_seconds 0 --out run',
    'experts': 'experts toys --n 2 --epochs 2 --batch 8 --width 4 --out experts',
    'bank': 'bank toys --nets 1 --stages 1,2 --width 4 --set bank_batch=8 --out bank',
    'comparison': 'compare toys --methods dm,dsa --ipc 1 --steps 1 --nets 1 --width 4 --set batch_real=4 '
                  '--out comparison',
    'studied': 'study iterations toys --outer 1 --every 1 --seeds 0 --starts random,k-means --samplers random '
               '--matches gradient --warms 0 --nets 1 --steps 1 --set width=4 --set inner=2 --set n_data=8 '
               '--out studied',
    'exported': 'export run --to imagefolder --out exported',
    'run/scores.json': 'scores run --archs convnet --nets 1',
    'run/result.json': 'evaluate run --rows distilled,full --nets 1',
    'run/grid.png': 'show run'}
MAKERS = {'run', 'experts', 'bank', 'comparison', 'studied', 'exported'} # make a folder

def images(folder, classes=3, each=8, size=8):
    "A folder of class folders"
    x, y = toy_images(classes, each, size)
    for i, (image, c) in enumerate(zip(x, y.tolist())):
        (folder/f'class{c}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder/f'class{c}'/f'{i:02}.png')
    return folder

def foreign(folder):
    "Sets in the layouts of other programs"
    x, y = toy_images(3, 2)
    x = x/255
    folder.mkdir()
    torch.save(dict(data=[[x - .5, y]], accs_all_exps={}), folder/'res_DM_toys_ConvNet_2ipc.pt')
    for name in 'idc', 'mtt', 'folders': (folder/name).mkdir()
    torch.save([x, y], folder/'idc'/'data.pt')
    write_json(folder/'idc'/'args.txt', dict(factor=1))
    for name, value in dict(images=x, labels=torch.eye(3)[y], lr=torch.tensor(.02)).items():
        torch.save(value, folder/'mtt'/f'{name}_best.pt')
    images(folder/'folders', each=2)
    torch.save(torch.eye(3)[y], folder/'folders'/'labels.pt')

class World:
    "A folder with everything that trials copy and damage"
    def __init__(self, folder):
        self.folder, self.made, self.count = Path(folder), Path(folder)/'made', 0
        self.made.mkdir()
        images(self.made/'toys')
        with self.inside(self.made):
            for argv in MAKE.values(): self.done(argv.split())
            foreign(self.made/'sets')
            for to in dp.WRITERS: self.done(['export', 'run', '--to', to, '--out', f'sets/{to}'])
        self.state = {name: state_of(self.made/name, self.made) for name in MAKE}

    def done(self, argv):
        ended = run(argv)
        if ended.status: raise RuntimeError(f'{argv}: {ended.err}')

    @contextmanager
    def inside(self, folder):
        before = Path.cwd()
        os.chdir(folder)
        try: yield Path(folder)
        finally: os.chdir(before)

    @contextmanager
    def trial(self, *names):
        "A folder of its own with copies of some of what was made; toys are always there"
        folder = self.folder/'trials'/f'{self.count}'/'here'
        self.count += 1
        folder.mkdir(parents=True)
        for name in ('toys', *names): copy(self.made/name, folder/name)
        with self.inside(folder):
            try: yield folder
            finally: shutil.rmtree(folder.parent, ignore_errors=True)

def copy(a, b):
    b.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(a, b, ignore=shutil.ignore_patterns('.lock')) if a.is_dir() else shutil.copy(a, b)

# One command in this process

class TooLong(BaseException): "Raised by the alarm"

@contextmanager
def alarm():
    def ring(*_): raise TooLong
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def run(argv):
    "Exit status, stdout and stderr of a command; a `Fault` for a traceback or a hang"
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            with alarm(): status = main([*map(str, argv)])
        except TooLong: fault('hangs', argv)
        except BaseException as e: fault('tracebacks', argv, repr(e), traceback.format_exc()[-900:])
        finally:
            for s, handler in kept.items(): signal.signal(s, handler)
    return SimpleNamespace(argv=argv, status=status, out=out.getvalue(), err=err.getvalue())

REMEDY = re.compile(r'; |\b(must|needs|use|give)\b')

def check_message(text, said, names=()):
    "A `Fault` unless a message is one short line with a remedy, and with one of the names"
    if '\n' in text or len(text) > 700 or not REMEDY.search(text):
        fault('messages without file or remedy', said, text)
    if names and not any(name in text for name in names):
        fault('messages without file or remedy', said, f'none of {names} in:', text)

def check(ended, folder, before, names=(), allowed=(0, 2), late=False):
    "Raise the `Fault` of an ended command; `late`: it may fail after it began, as on a full disk"
    *_, last = ended.err.rstrip('\n').split('\n')
    if 'Traceback' in ended.err or ended.status == 3: fault('tracebacks', ended.argv, last)
    if ended.status not in allowed: fault('wrong exit statuses', ended.argv, ended.status, last)
    if ended.status == 2:
        if not last.startswith('dreamplus: error: '): fault('messages without file or remedy', ended.argv, last)
        if not late and ended.err.count('\n') > 1: fault('messages without file or remedy', ended.argv, ended.err)
        check_message(last, ended.argv, names)
    check_left(folder, before, ended, ended.status == 2 and not late)

def listing(folder):
    "The paths in a folder, except locks"
    return {p.relative_to(folder) for p in folder.rglob('*') if p.name != '.lock'}

def check_left(folder, before, ended, refused):
    "A `Fault` for temporary files, and for anything new where a command was refused"
    left = sorted(map(str, listing(folder) - before))
    if refused and left: fault('leftovers', ended.argv, left, ended.err)
    if temporary := [p for p in left if '.dreamplus-' in p]: fault('leftovers', ended.argv, temporary)

# What a folder holds, without what depends on time and place

LATER = re.compile('second|peak|time|version|place|hardware|test_uses|cached|origin|source|folder|changed|created')

def plain(value, here):
    if isinstance(value, dict): return {k: plain(v, here) for k, v in value.items() if not LATER.search(k)}
    if isinstance(value, list): return [plain(v, here) for v in value]
    return value.replace(str(here), '') if isinstance(value, str) else value

def content(path, here):
    "The content of a file, to be compared"
    if '.dreamplus-' in path.as_posix(): return None # what a kill has left, perhaps half of a file
    if path.suffix == '.safetensors':
        state = load_state(path)
        parts = {k: state[k] for k in ('pixels', 'labels', 'model', 'tau', 'net') if k in state}
        return json.dumps(plain(parts, here), default=lambda t: fingerprint(t))
    if path.suffix == '.json': return plain(json.loads(path.read_text()), here)
    if path.suffix == '.jsonl': return [plain(json.loads(line), here) for line in path.read_text().splitlines()]
    if path.suffix == '.csv': return [line.split(',')[:2] for line in path.read_text().splitlines()]
    return path.read_bytes() if path.suffix == '.png' and path.name[0].isdigit() else None # figures have dates

def state_of(path, here):
    files = [p for p in path.rglob('*') if p.is_file() and p.name != '.lock'] if path.is_dir() else [path]
    return {p.relative_to(path.parent).as_posix(): content(p, here) for p in sorted(files)}

def check_same(world, name, folder, said):
    "A `Fault` unless what a command made in spite of all is what it makes undisturbed"
    own, wanted = state_of(folder/name, folder), world.state[name]
    if name == 'run': own, wanted = ({k: v for k, v in s.items() if not k.endswith(('result.json', 'scores.json'))}
                                     for s in (own, wanted))
    differ = sorted(k for k in own.keys() | wanted.keys() if own.get(k, ...) != wanted.get(k, ...))
    if differ: fault('unequal results', said, differ)

# Kills: in a process of its own, at a call of a function of the package or at a change of a file

PACKAGE = str(Path(dp.__file__).parent)

OUTER = 'cli.py', 'messages.py', 'options.py' # report errors, and are not disturbed

def at_call(n, act):
    "Call `act` at the n-th call of a function of the package"
    left = [n]
    def profile(frame, event, arg):
        file = frame.f_code.co_filename
        if event != 'call' or not file.startswith(PACKAGE) or file.endswith(OUTER): return
        if frame.f_code.co_flags & inspect.CO_GENERATOR: return # may be entered to be closed
        left[0] -= 1
        if left[0] == 0:
            sys.setprofile(None)
            act()
    sys.setprofile(profile)

def at_write(n, act):
    "Call `act` at the n-th time that a file is put into place"
    left, replace = [n], os.replace
    def patched(a, b):
        left[0] -= 1
        if left[0] == 0:
            os.replace = replace
            act(a, b)
        replace(a, b)
    os.replace = patched
    return replace

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def die_half(a, b):
    if os.path.isfile(a): os.truncate(a, os.path.getsize(a)//2)
    die()

def disturbed(folder, argv, how, n):
    "Run a command that is killed or stopped on its way"
    PROTOCOLS['quick'] = QUICK
    if how == 'call': at_call(n, die)
    if how in ('SIGINT', 'SIGTERM'): at_call(n, lambda: os.kill(os.getpid(), getattr(signal, how)))
    if how == 'half': at_write(n, die_half)
    if how == 'write': at_write(n, die)
    return command(folder, *argv)

def again(name, folder, argv):
    "The command that goes on"
    if name == 'run' and (folder/'run'/'run.json').exists(): return ['resume', 'run', '--nets', 0]
    return argv

def in_process(f, *args):
    "What a process returned; a `Fault` if it hangs"
    process = Process(f, *args)
    if not process.answers.poll(2*LIMIT):
        process.process.kill()
        fault('hangs', args[1:])
    return process.end()

def needs(name):
    "What a command of MAKE finds in its folder"
    return [] if name in MAKERS - {'exported'} else ['run']

@kind
def kills(world, rng):
    "Killed once or twice at random, then repeated: the result is that of an undisturbed command"
    name = rng.choice([*MAKE])
    argv = MAKE[name].split()
    with world.trial(*needs(name)) as folder:
        said, answer = [], None
        for _ in range(rng.choice([1, 1, 2])):
            if name == 'exported' and answer and not answer[0]: break # is done
            how = rng.choice(['call', 'call', 'half', 'write', 'SIGINT', 'SIGTERM'])
            n = int(math.exp(rng.uniform(0, math.log(4000)))) if how not in ('half', 'write') else rng.randint(1, 9)
            said.append((how, n))
            answer, status = in_process(disturbed, folder, again(name, folder, argv), how, n)
            if answer is None and status != -signal.SIGKILL: fault('tracebacks', argv, said, status)
            if answer and answer[0] not in (0, 130): fault('wrong exit statuses', argv, said, answer[0], answer[2])
            if answer and answer[0] == 130 and 'stopped; ' not in answer[2]:
                fault('messages without file or remedy', argv, said, answer[2])
        if name != 'exported' or state_of(folder/name, folder) != world.state[name]: # which is not written twice
            ended = run(again(name, folder, argv))
            if ended.status: fault('wrong exit statuses', argv, said, ended.status, ended.err)
        if left := [p for p in folder.rglob('.dreamplus-*')]: fault('leftovers', argv, said, left)
        check_same(world, name, folder, (argv, said))

def undisturbed(folder, argv):
    PROTOCOLS['quick'] = QUICK
    return command(folder, *argv)

@kind
def side_by_side(world, rng):
    "Two or three equal commands at once: each is done or refused, and the result is that of one"
    name = rng.choice([*MAKE])
    argv = MAKE[name].split()
    with world.trial(*needs(name)) as folder:
        processes = [Process(undisturbed, folder, argv) for _ in range(rng.choice([2, 3]))]
        answers = [p.end()[0] for p in processes]
        for answer in answers:
            if answer is None: fault('tracebacks', argv, 'died')
            status, _, err = answer
            if status not in (0, 2): fault('wrong exit statuses', argv, status, err)
            if status == 2: check_message(err.rstrip('\n').split('\n')[-1], argv)
        if all(status for status, *_ in answers): fault('wrong exit statuses', argv, 'all are refused', answers[0][2])
        if left := [p for p in folder.rglob('.dreamplus-*')]: fault('leftovers', argv, left)
        check_same(world, name, folder, argv)

# Faults of the system, in this process

ERRORS = 28, 30, 13, 5, 27, 24 # no space, read-only, permission, input/output, file too large, too many files
_armed = SimpleNamespace(left=0, error=None, events=())

def _hook(event, args):
    if not _armed.left or event not in _armed.events: return
    if event == 'open' and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)): return
    if not str(args[0]).startswith(_armed.under): return
    _armed.left -= 1
    if not _armed.left: raise OSError(_armed.error, os.strerror(_armed.error), str(args[0]))

_hooked = []

@contextmanager
def failing(under, event, n, error):
    "The n-th such event below a folder raises an error"
    if not _hooked: sys.addaudithook(_hook), _hooked.append(True) # which cannot be removed
    vars(_armed).update(left=n, error=error, events=(event,), under=str(under))
    try: yield
    finally: _armed.left = 0

@kind
def system(world, rng):
    "A write that fails, too little memory, and a second try"
    name = rng.choice([*MAKE])
    argv = MAKE[name].split()
    with world.trial(*needs(name)) as folder:
        before, how = listing(folder), rng.choice(['open', 'os.rename', 'os.mkdir', 'memory'])
        if how == 'memory':
            error = rng.choice([MemoryError(), RuntimeError("can't allocate memory")])
            def fail(): raise error
            at_call(int(math.exp(rng.uniform(0, math.log(4000)))), fail)
            try: ended = run(argv)
            finally: sys.setprofile(None)
        else:
            error = rng.choice(ERRORS)
            with failing(folder, how, rng.randint(1, 8), error): ended = run(argv)
        check(ended, folder, before, late=True)
        if name != 'exported' or ended.status: ended = run(again(name, folder, argv))
        if ended.status: fault('wrong exit statuses', argv, how, error, ended.status, ended.err)
        check_same(world, name, folder, (argv, how, error))

# Options and arguments

BASES = dict(
    distill='distill toys --method dm --outer 1 --inner 1 --width 4 --nets 0 --set batch_real=4 --out new',
    resume='resume run --nets 0', evaluate='evaluate run --rows distilled --nets 1', show='show run',
    export='export run --to npz --out new', doctor='doctor run', scores='scores run --archs convnet --nets 1',
    experts='experts toys --n 1 --epochs 1 --width 4 --out new',
    bank='bank toys --nets 1 --stages 1 --width 4 --out new',
    compare='compare toys --methods dm --ipc 1 --steps 1 --nets 1 --width 4 --out new',
    study=MAKE['studied'].replace('studied', 'new'), leaderboard='leaderboard run comparison --out new.md',
    continual='continual toys --steps 3 --ipc 1 --methods random --orders 1 --nets 1 --training epochs=1 --out new',
    nas='nas toys --sets sets/idc --sample 3 --steps 2 --full 2 --baselines none --out new',
    plan='plan toys --method dm --width 4 --nets 0', reproduce='reproduce svhn --list', methods='methods')
WORDS = ['', ' ', '0', '-1', '1.5', 'nan', 'inf', '-inf', '1e30', '1e-30', '99999999999999999999', '[', '['*3000,
         '{}', '[1]', '{"a":1}', 'null', 'true', 'é', '\n', '.', '..', 'nowhere', 'toys', 'run', '/dev/null',
         '/dev/null/x', '/proc/x', 'x'*300, 'None', 'digits', '0,0', ',', '=', '0x10', '١', 'cpu', 'cuda:99', 'mps',
         '../here/run', '*', 'a\x00b', '\x1b[2J', '\udce9', '-', '--', '1_0', '+1', ' 1 ']

def options_of(name):
    "The options of a command, and the arguments for --set"
    sub = make_parser(COMMANDS, name).commands[name]
    flags = [a.option_strings[0] for a in sub._actions if a.option_strings and a.nargs != 0]
    return flags, sorted({n for part in all_parts().values() for n in arguments(part)})

@kind
def options(world, rng):
    "One or two options with odd values"
    name = rng.choice([*BASES])
    flags, parts = options_of(name)
    argv = BASES[name].split()
    for _ in range(rng.choice([1, 1, 2])):
        word = rng.choice(WORDS)
        if '--set' in flags and rng.random() < .5: argv += ['--set', f'{rng.choice(parts)}={word}']
        elif flags and rng.random() < .85: argv += [rng.choice(flags), word]
        else: argv.insert(rng.randrange(len(argv) + 1), word)
    with world.trial('run', 'comparison', 'experts', 'sets/idc') as folder:
        before = listing(folder)
        ended = run(argv)
        check(ended, folder, before, allowed=(0, 1, 2) if name == 'doctor' else (0, 2), late='not finite' in ended.err)

VALUES = [None, 'x', '', b'x', 5, 0, -1, 1.5, math.nan, math.inf, 10**20, [], {}, (), True, set(), object(), print,
          Path('nowhere'), np.float64('nan'), np.int64(-1), np.zeros(3), torch.zeros(2), torch.tensor(math.nan),
          [1, 'x'], {'a': 1}, 1j, range(3), ['x'], [[1.], [0.]], '\udce9', np.array('x'),
          np.ma.masked_array([1, 2], [0, 1])]

def calls(data, dset):
    "Functions with arguments that are right"
    short = dict(outer=1, inner=1, width=4, batch_real=4, log=None)
    return [
        (dp.distill, dict(data=data, method='dm', ipc=1, out='new', **short)), (dp.resume, dict(out='run', log=None)),
        (dp.recipe, dict(method='dm', data='digits', ipc=1)), (dp.load_data, dict(source='toys')),
        (dp.score, dict(dset=dset, data=data, n=1, rows=('distilled',))),
        (dp.plan, dict(data=data, method='dm', **short)),
        (dp.compare, dict(data=data, methods=['dm'], ipc=(1,), out='new', steps=1, nets=1, width=4, log=None)),
        (dp.train_experts, dict(data=data, out='new', n=1, epochs=1, width=4, log=None)),
        (dp.evaluate_run, dict(out='run', data=data, n=1, rows=('distilled',))),
        (dp.load_distilled, dict(path='run')), (dp.results_table, dict(folders=['run'])), (leaderboard, dict()),
        (dp.create_net, dict(arch='convnet', channels=1, classes=3, size=8)), (dp.doctor, dict(what='run')),
        (dp.toy_images, dict(classes=2)),
        (dp.DistilledSet, dict(pixels=dset.pixels, classes=dset.classes, y=dset.y, mean=dset.mean, std=dset.std)),
        (dset.export, dict(path='new', to='npz')), (dset.save, dict(path='new')), (dset.select, dict(classes=[0])),
        (dset.to_imagefolder, dict(path='new')), (dset.grid, dict(classes=2)), (dset.dls, dict(bs=2)),
        (dp.ValidAccuracy, dict(nets=1)), (dp.Augment, dict(ops='flip')),
        (dp.robust, dict(dset=dset, data=data, n=1)),
        (data.hold_out, dict(fraction=.2)), (data.select, dict(ids=[0, 1])), (data.show, dict(n=1)),
        (data.with_stats, dict(stats=None)), (data.class_batch, dict(ids=[0]))]

@kind
def python(world, rng):
    "A wrong argument of a function: `ValueError` or `TypeError` with the remedy, or it works"
    with world.trial('run') as folder:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            data, dset = dp.load_data('toys'), dp.load_distilled('run')
            f, kw = rng.choice(calls(data, dset))
            takes = [n for n, p in inspect.signature(f).parameters.items()
                     if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            name = rng.choice([*takes, *kw, *(['lr', 'match', 'norm', 'p'] if f in (dp.distill, dp.recipe) else [])]
                              or ['x'])
            kw = kw | {name: rng.choice(VALUES)} if takes or kw else {}
            said, before = f'{getattr(f, "__qualname__", f)}({name}={kw.get(name)!r:.60})', listing(folder)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                try:
                    with alarm(): f(**kw)
                except TooLong: fault('hangs', said)
                except (ValueError, TypeError) as e:
                    check_message(str(e), said)
                    check_left(folder, before, SimpleNamespace(argv=said, err=str(e)), True)
                except OSError as e:
                    if e.errno is None: fault('tracebacks', said, repr(e))
                except BaseException as e: fault('tracebacks', said, repr(e), traceback.format_exc()[-600:])

# Files

def edit(value, rng):
    "A JSON value with one entry changed or removed"
    if isinstance(value, (dict, list)) and value and rng.random() < .85:
        key = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
        new = value.copy()
        if rng.random() < .2: del new[key]
        else: new[key] = edit(value[key], rng)
        return new
    return rng.choice([None, 'x', [], {}, -1, 5, 1.5, math.nan, math.inf, 10**400, True, [[]], {'a': 1}, '\x1b[2J'])

def damage(path, rng):
    "Damage a file; says how"
    raw = path.read_bytes()
    how = rng.choice(['cut', 'flip', 'empty', 'zeros', 'other', 'gone', 'folder', 'pipe', 'edit', 'edit', 'edit'])
    is_json = path.suffix in ('.json', '.jsonl', '.txt')
    if how == 'edit' and not is_json: how = 'flip'
    if how == 'cut': path.write_bytes(raw[:rng.randrange(max(1, len(raw)))])
    if how == 'flip' and raw:
        new = bytearray(raw)
        for _ in range(rng.choice([1, 3])): new[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(new)
    if how == 'empty': path.write_bytes(b'')
    if how == 'zeros': path.write_bytes(bytes(len(raw)))
    others = b'{', b'[]', b'5', b'null', b'['*100_000, b'\xff\xfe', b'PK\x03\x04', b'\x89PNG\r\n\x1a\n', b'{"a": NaN}'
    if how == 'other': path.write_bytes(rng.choice([*others, raw + raw]))
    if how in ('gone', 'folder', 'pipe'): path.unlink()
    if how == 'folder': path.mkdir()
    if how == 'pipe': os.mkfifo(path)
    if how == 'edit':
        lines = raw.decode().splitlines() if path.suffix == '.jsonl' else [raw.decode()]
        i = rng.randrange(len(lines))
        with suppress(ValueError): lines[i] = json.dumps(edit(json.loads(lines[i]), rng))
        path.write_text('\n'.join(lines) + '\n')
    return how

READ = { # folder -> commands that read it
    'run': [BASES['resume'], BASES['evaluate'], 'show run', BASES['export'], 'doctor run', BASES['scores'],
            'leaderboard run', 'distill toys --method dm --outer 1 --inner 1 --width 4 --nets 0 --start run --out new'],
    'experts': ['experts toys --n 2 --epochs 2 --batch 8 --width 4 --out experts',
                'distill toys --method mtt --outer 1 --inner 1 --width 4 --nets 0 --experts experts --set max_start=1 '
                '--set expert_epochs=1 --set syn_steps=1 --set zca=false --out new'],
    'bank': [MAKE['bank'], 'bank toys --list'], 'comparison': [MAKE['comparison'], 'leaderboard comparison'],
    'studied': [MAKE['studied']]}

@kind
def files(world, rng):
    "A damaged file in a folder of dreamplus: mended or refused, and named"
    name = rng.choice([*READ])
    with world.trial(name) as folder:
        path = rng.choice(sorted(p for p in (folder/name).rglob('*') if p.is_file() and p.name != '.lock'))
        how = damage(path, rng)
        for argv in rng.sample(READ[name], min(2, len(READ[name]))):
            before = listing(folder)
            ended = run(argv.split())
            allowed = (0, 1, 2) if argv.startswith('doctor') else (0, 2)
            try: check(ended, folder, before, [path.name, name, 'new'], allowed, late='not finite' in ended.err)
            except Fault as e: fault(e.args[0], path.relative_to(folder), how, e.args[1])

@kind
def sets(world, rng):
    "A damaged set of another program or an export"
    with world.trial('sets') as folder:
        name = rng.choice(sorted(p.name for p in (folder/'sets').iterdir()))
        place = folder/'sets'/name
        every = sorted(p for p in place.rglob('*') if p.is_file()) if place.is_dir() else [place]
        path = rng.choice(every)
        how = damage(path, rng) if rng.random() < .9 else 'whole'
        argv = rng.choice(['evaluate {} --data toys --rows distilled --nets 1', 'show {} --data toys', 'show {}',
                           'export {} --data toys --out new --to npz', 'doctor {} --data toys', 'leaderboard {}',
                           'scores {} --data toys --nets 1 --archs convnet']).format(f'sets/{name}').split()
        if '--data' in argv and argv[0] != 'doctor' and rng.random() < .7:
            argv += '--set values=unit --set factor=1'.split()
        before = listing(folder)
        ended = run(argv)
        allowed = (0, 1, 2) if argv[0] == 'doctor' else (0, 2)
        try: check(ended, folder, before, [path.name, name], allowed)
        except Fault as e: fault(e.args[0], path.relative_to(folder), how, e.args[1])

# Data

def spoil(folder, rng):
    "Make a folder of images odd; says how"
    c, name = folder/'class1', rng.choice(['bad.png', 'bad.jpg', 'bad.gif', 'bad', 'bad.txt', 'bad.tif', '.bad.png'])
    bad, good = c/name, c/'08.png'
    ways = dict(
        fifo=lambda: os.mkfifo(bad), link=lambda: bad.symlink_to('/dev/zero'), lost=lambda: bad.symlink_to('nowhere'),
        loop=lambda: (c/'loop').symlink_to(folder), self=lambda: bad.symlink_to(bad), folder=lambda: bad.mkdir(),
        empty=lambda: bad.write_bytes(b''), text=lambda: bad.write_text('x'),
        ghost=lambda: bad.write_bytes(b'%!PS-Adobe-3.0'),
        cut=lambda: bad.write_bytes(good.read_bytes()[:rng.randrange(80)]), gone=lambda: shutil.rmtree(c),
        wide=lambda: Image.new('L', (8, 5)).save(bad, 'png'), colour=lambda: Image.new('RGB', (8, 8)).save(bad, 'png'),
        deep=lambda: Image.new('I;16', (8, 8)).save(bad, 'png'),
        large=lambda: Image.new('L', (99, 99)).save(bad, 'png'),
        clear=lambda: Image.new('RGBA', (8, 8)).save(bad, 'png'),
        few=lambda: [p.unlink() for p in [*c.iterdir()][1:]], none=lambda: [p.unlink() for p in c.iterdir()],
        one=lambda: [shutil.rmtree(folder/f'class{i}') for i in (0, 1)],
        renamed=lambda: c.rename(
            folder/rng.choice(['a\nb', 'é', '\udce9', 'train', 'test', '.x', ' ', '-', '__MACOSX'])),
        parts=lambda: [shutil.copytree(folder/'class0', folder/part/k) for part in ('train', 'test') for k in 'ab'],
        listed=lambda: (folder/'classes.json').write_text(rng.choice(['{', '[]', '{"folders": ["class0"]}', '5'])),
        socket=lambda: socket.socket(socket.AF_UNIX).bind(os.path.relpath(bad)))
    how = rng.choice([*ways])
    ways[how]()
    return how

@kind
def folders(world, rng):
    "An odd folder of images: read, or refused with its name"
    with world.trial() as folder:
        how = spoil(folder/'toys', rng)
        before = listing(folder)
        argv = rng.choice([BASES['distill'], BASES['plan'], BASES['experts']]).split()
        if rng.random() < .4: argv += rng.choice([['--size', '8'], ['--channels', '1'], ['--channels', '3']])
        ended = run(argv)
        try: check(ended, folder, before, ['toys', 'class', '--', 'bad', 'train', 'test'])
        except Fault as e: fault(e.args[0], how, e.args[1])

def arrays(rng):
    "Odd images and labels, as people have them"
    x, y = toy_images(3, 6)
    x, y = x.numpy(), y.numpy()
    if rng.random() < .7: x = rng.choice([
        lambda: x.astype(rng.choice(['f4', 'f8', '>f4', 'i2', 'u2', 'i8', 'bool', 'c8', 'f2'])), lambda: x/255,
        lambda: x[:, 0], lambda: x.transpose(0, 2, 3, 1), lambda: x[:, :, :5], lambda: x[:0], lambda: x[0],
        lambda: x.astype(object),
        lambda: np.ma.masked_array(x, x > 200), lambda: x/255*np.nan, lambda: [*x], lambda: [x[0], x[1][:, :4]],
        lambda: torch.from_numpy(x).to_sparse(), lambda: torch.from_numpy(x).to('meta'), lambda: 'x', lambda: None,
        lambda: torch.from_numpy(x).bfloat16()/255, lambda: x.tobytes(), lambda: np.matrix(x[0, 0]),
        lambda: torch.from_numpy(x/255.).requires_grad_(), lambda: np.broadcast_to(x[:1], x.shape), lambda: x[::-1],
        lambda: (i for i in x), lambda: {'x': x}, lambda: x.astype('S1'), lambda: x/1e9 - 1])()
    if rng.random() < .7: y = rng.choice([
        lambda: y.astype(rng.choice(['f4', 'i1', '>i4', 'bool', 'U1', 'O', 'u8', 'c8'])), lambda: y + .5,
        lambda: y*10**18, lambda: y - 1, lambda: y[:5], lambda: y[:, None], lambda: np.eye(3)[y],
        lambda: [*map(str, y)],
        lambda: y*0,
        lambda: np.ma.masked_array(y, y == 1), lambda: y*np.nan, lambda: None, lambda: [None]*len(y), lambda: 'x',
        lambda: y.astype('M8[s]'), lambda: {*y}, lambda: torch.from_numpy(y).to('meta'), lambda: y[::-1].copy(),
        lambda: np.full(len(y), -1), lambda: y*1e300, lambda: [int(c) for c in y], lambda: np.arange(len(y))])()
    return x, y

@kind
def data_in_memory(world, rng):
    "Odd arrays, dictionaries and datasets: read, or refused with the remedy"
    x, y = arrays(rng)
    class Items:
        def __len__(self): return len(y)
        def __getitem__(self, i): return x[i], y[i]
    class Odd(Items):
        classes = rng.choice([3, None, ['a'], {'a', 'b'}, {'a': 0}, 'abc', lambda: ['a', 'b', 'c'], [1, 2, 3], ['a']*3])
    source = rng.choice([lambda: (x, y), lambda: (x, y), lambda: dict(x=x, y=y), lambda: dict(x_train=x, y_train=y),
                         lambda: dict(train=(x, y), test=(x, y)), Items, Odd, lambda: ((x, y), (x, y)), lambda: [x, y],
                         lambda: dict(images=x), lambda: dict(train=Items(), val=Odd())])()
    kw = rng.choice([{}, {}, dict(size=4), dict(channels=3), dict(levels=(0, 4095)), dict(valid=.5), dict(fraction=.9),
                     dict(test=(x, y)), dict(stats=([.5], [.2]))])
    said = f'{type(source).__name__} of {type(x).__name__} {getattr(x, "dtype", "")} and {type(y).__name__} ' \
           f'{getattr(y, "dtype", "")}, {kw.keys()}'
    with world.trial(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            with alarm(): found = dp.load_data(source, **kw)
            if found.train.x.dtype != torch.uint8: fault('unequal results', said)
        except TooLong: fault('hangs', said)
        except (ValueError, TypeError) as e: check_message(str(e), said)
        except Fault: raise
        except BaseException as e: fault('tracebacks', said, repr(e), traceback.format_exc()[-600:])

# The campaign

SLOW = 'kills', 'side by side', 'system' # have their turn once in two rounds

def campaign(seed=0, seconds=math.inf, trials=None, kinds=(), first=0, say=print):
    "Counts by kind, and the faults: (kind, number of the trial, which, circumstances)"
    counts, found, begun = {}, [], time.monotonic()
    chosen = {k: KINDS[k] for k in kinds or KINDS}
    cache, home = (os.environ.get(k) for k in ('DREAMPLUS_CACHE', 'HOME'))
    threads, kept = torch.get_num_threads(), PROTOCOLS['quick']
    torch.set_num_threads(1) # the bits depend on it
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= dict(DREAMPLUS_CACHE=f'{folder}/cache', HOME=folder, http_proxy='http://127.0.0.1:9',
                           https_proxy='http://127.0.0.1:9')
        try:
            PROTOCOLS['quick'] = QUICK
            world, turn = World(folder), 0
            while time.monotonic() - begun < seconds and (trials is None or turn < trials):
                for name, f in chosen.items():
                    if trials is None and name in SLOW and turn % 2: continue
                    row, number = counts.setdefault(name, dict.fromkeys(('trials', *FAULTS), 0)), first + turn
                    row['trials'] += 1
                    try: f(world, Random(f'{seed} {name} {number}'))
                    except Fault as e:
                        row[e.args[0]] += 1
                        found.append((name, number, *e.args))
                        say(f'{name} {number}: {e.args[0]}: {e.args[1]}')
                turn += 1
        finally:
            PROTOCOLS['quick'] = kept
            torch.set_num_threads(threads)
            for k, v in dict(DREAMPLUS_CACHE=cache, HOME=home).items():
                os.environ.pop(k) if v is None else os.environ.update({k: v})
            for k in 'http_proxy', 'https_proxy': os.environ.pop(k)
    return counts, found

def table(counts):
    "One line for each kind, and the sums"
    columns = 'trials', *FAULTS
    rows = [[name, *(row[c] for c in columns)] for name, row in counts.items()]
    return markdown_table(['kind', *columns], [*rows, ['all', *(sum(r[c] for r in counts.values()) for c in columns)]])

def main_(argv=None):
    parser = argparse.ArgumentParser('python -m tests.campaign', description=__doc__.split('\n\n')[0])
    parser.add_argument('--seconds', type=float, default=math.inf, help='end after this time')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--trials', type=int, help='of each kind')
    parser.add_argument('--first', type=int, default=0, help='number of the first trial')
    parser.add_argument('--kinds', default='', help=f'some of {", ".join(KINDS)}, separated by commas')
    parser.add_argument('--out', help='a file for the record')
    args = parser.parse_args(argv)
    if args.trials is None and args.seconds == math.inf: parser.error('give --seconds or --trials')
    begun = time.monotonic()
    counts, found = campaign(args.seed, args.seconds, args.trials, [*filter(None, args.kinds.split(','))], args.first)
    print(table(counts))
    record = dict(command=f'python -m tests.campaign --seconds {args.seconds:g} --seed {args.seed}', seed=args.seed,
                  seconds=round(time.monotonic() - begun), device='cpu', hardware=hardware(torch.device('cpu')),
                  versions=versions(), data=fingerprint(*toy_images(3, 8)), counts=counts)
    if args.out: write_json(args.out, record)
    return int(bool(found))

if __name__ == '__main__': sys.exit(main_())
