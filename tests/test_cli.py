"The command line as a user runs it: what it makes, what it says, and what it refuses in one line."
import ast
import copy
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from notebooks import ROOT
from PIL import Image

from dreamplus import __version__
from dreamplus.arguments import arguments
from dreamplus.cli import COMMANDS, main
from dreamplus.options import make_parser
from dreamplus.core import atomic, load_state, read_json, toy_images, write_json
from dreamplus.data.datasets import DATASETS, Dataset
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import evaluate_run, remember, score
from dreamplus.judge.protocols import PROTOCOLS
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.loop.distill import distill
from dreamplus.loop.report import read_history
from dreamplus.machine import pick_device
from dreamplus.match.core import MATCHERS
from dreamplus.match.distribution import EmbeddingMatcher
from dreamplus.parts import all_parts
from dreamplus.recipes import METHODS, recipe
from dreamplus.runs import RunFolder

TINY = shlex.split('distill --method dream+ --outer 1 --inner 2 --width 8 --nets 0 --set n_data=32 --set batch_real=8 '
                   '--set warm_epochs=.1')

@pytest.fixture(scope='module', autouse=True)
def quick():
    "A short protocol; one thread, since two wait for each other where something else runs"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, 'quick', dict(epochs=3, steps=5))
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)

def run(*argv):
    "Status, stdout and stderr of `dreamplus *argv` in this process"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err: status = main([*map(str, argv)])
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())

def done(*argv):
    ended = run(*argv)
    assert ended.status == 0, ended.err
    return ended.out

def contents(folder=Path()): return {p: p.is_file() and p.read_bytes() for p in folder.rglob('*') if p.name != '.lock'}

def assert_one_line(status, err, *says):
    assert status == 2 and re.fullmatch(r'dreamplus: error: .+\n', err), err
    assert not [part for part in says if part not in err], err

@pytest.mark.parametrize('name, says', [('distill', '`dreamplus resume RUN` continues'),
                                        ('study', 'the same command continues'), ('methods', 'nothing is left')])
@pytest.mark.parametrize('stop', [signal.SIGINT, signal.SIGTERM])
def test_stop(monkeypatch, name, says, stop):
    "Wherever a command is, Ctrl-C and SIGTERM end it with a line that says how to go on"
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler) # a shell may have begun these tests deaf to it
    monkeypatch.setitem(COMMANDS, name, lambda: os.kill(os.getpid(), stop))
    ended = run(name)
    for s, handler in before.items(): signal.signal(s, handler)
    assert ended.status == 130 and ended.err.startswith(f'\nstopped; {says}')

def refused(*argv, says=()):
    "One line, exit status 2, no traceback, nothing left behind"
    before = contents()
    ended = run(*argv)
    assert_one_line(ended.status, ended.err, *says)
    assert contents() == before

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

# A whole small run

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What a run printed, and its folder, which tests only read"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('whole'))
        return done(*TINY, '--nets', 2, '--valid', .2), Path('runs/digits-dream+-ipc1-seed0').absolute()

@pytest.fixture
def finished(whole, here): return shutil.copytree(whole[1], here/'run')

def test_files_of_a_run(whole):
    out, folder = whole
    assert sorted(p.relative_to(folder.parents[1]).as_posix() for p in contents(folder.parents[1])) == [
        'runs', 'runs/digits-dream+-ipc1-seed0', *sorted(f'runs/digits-dream+-ipc1-seed0/{name}' for name in (
            'run.json', 'history.csv', 'checkpoint', 'checkpoint/state.safetensors', 'distilled.safetensors',
            'distilled.json', 'grid.png', 'result.json', 'start.safetensors'))]

def test_result(whole):
    result = read_json(whole[1]/'result.json')
    rows = result.pop('rows')
    assert set(result) == {'dataset', 'method', 'ipc', 'factor', 'arch', 'width', 'protocol', 'seed', 'device',
                           'seconds', 'peak_mib', 'versions', 'data', 'test_uses', 'training', 'images', 'network',
                           'args', 'settings'}
    expected = dict(dataset='digits', method='dream+', ipc=1, factor=1, arch='convnet', width=8, protocol='quick',
                    seed=0, device=str(pick_device()))
    assert expected.items() <= result.items()
    assert set(result['seconds']) == {'distill', 'evaluate'} and min(result['seconds'].values()) > 0
    assert result['peak_mib'] > 0 and result['versions']['torch'] == torch.__version__.split('+')[0]
    assert [row['set'] for row in rows] == ['distilled', 'start', 'random', 'k-means', 'full']
    for row in rows:
        assert set(row) - {'cached'} == {'set', 'acc', 'std', 'n', 'accs', 'ci', 'ece'}
        assert row['n'] == len(row['accs']) == 2
        assert all(0 <= a <= 1 for a in row['accs']) and row['acc'] == sum(row['accs'])/2
        assert row['std'] == pytest.approx(abs(row['accs'][0] - row['accs'][1])/2**.5)
    assert rows[-1]['acc'] > .4 # so not by chance, and not in per cent

def test_what_a_run_says(whole):
    out, folder = whole
    lines = out.rstrip('\n').split('\n')
    assert lines[-1].endswith('runs/digits-dream+-ipc1-seed0')
    rows = read_json(folder/'result.json')['rows']
    table = lines[-2 - len(rows):-2]
    assert [line.split()[:2] for line in table] == [[r['set'], f'{100*r["acc"]:.1f}'] for r in rows]
    head, *progress = [line.split() for line in lines[2:5]]
    assert head == ['iteration', 'loss', 'valid_acc', 'seconds', 'peak', 'MiB']
    history = read_history(folder)
    assert [row['step'] for row in history] == [1, 2]
    for line, row in zip(progress, history): # the validation split was measured
        assert line[0] == str(row['step']) and line[2] == f'{row["valid_acc"]:.3f}' and 0 < row['valid_acc'] <= 1

@pytest.mark.parametrize('flag', ['--json', '--quiet'])
def test_for_machines(flag):
    "`--quiet` prints the result only; `--json` prints it as JSON, and the rest to standard error"
    ended = run(*TINY, '--out', 'run', '--nets', 1, flag)
    progress = 'iteration' in ended.out, 'iteration' in ended.err
    if flag == '--quiet': assert progress == (False, False) and ended.out.startswith('digits, dream+, ipc 1')
    else:
        assert progress == (False, True)
        assert json.loads(ended.out) == read_json('run/result.json') | dict(run='run')

def test_plan_without_the_data(here):
    "downloads nothing"
    out = done('plan', 'mnist', '--method', 'dm', '--root', here, '--width', 4, '--nets', 0, '--set', 'batch_real=8')
    assert 'mnist is not here: planned with random images' in out and '60000 train' in out and not [*here.iterdir()]

def test_list_of_published_settings(here):
    lines = [line.split()[0] for line in done('reproduce', 'svhn', '--list').split('\n')[1:-1]]
    assert lines and all('svhn' in name for name in lines)
    refused('reproduce', 'nothing', '--list', says=["no published setting has 'nothing' in its name"])

def test_folders_are_numbered(here):
    for name in ('digits-dream+-ipc1-seed0', 'digits-dream+-ipc1-seed0-2'):
        assert done(*TINY).endswith(f'runs/{name}\n') and (here/'runs'/name).is_dir()

def test_two_runs_at_once(here, monkeypatch):
    "take different folders; a folder into which nothing was put does not stay"
    taken = []
    def another(*args, out, **kw):
        taken.append(out.name)
        if len(taken) < 3: done(*TINY)
    monkeypatch.setattr('dreamplus.loop.distill.distill', another)
    done(*TINY)
    assert taken == ['digits-dream+-ipc1-seed0', 'digits-dream+-ipc1-seed0-2', 'digits-dream+-ipc1-seed0-3']
    assert not [*here.iterdir()]

def test_compiled(here, monkeypatch):
    "Networks and embeddings go through `torch.compile`; where it fails, nothing is begun"
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: compiled.append(f) or f)
    done(*TINY, '--out', 'usual')
    assert not compiled and not read_json('usual/run.json')['args']['compiled']
    done(*TINY, '--out', 'fast', '--compiled')
    assert read_json('fast/run.json')['args']['compiled'] is True
    names = {getattr(f, '__name__', 'network') for f in compiled}
    assert names == {'network', 'embed', '<lambda>'} # the last is the trial of the compiler
    assert (here/'fast/distilled.safetensors').exists()
    def fails(f, **kw): raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', fails)
    refused(*TINY, '--out', 'none', '--compiled', says=['compiled=True needs a C++ compiler'])
    refused('plan', '--method', 'dream+', '--width', 8, '--compiled', says=['compiled=True needs a C++ compiler'])

def test_evaluate(finished):
    before = read_json('run/result.json')
    out = done('evaluate', 'run', '--rows', 'full,distilled', '--nets', 1)
    assert f', written to {Path("run")/"result.json"}' in out
    after = read_json('run/result.json')
    assert [line.split()[0] for line in out.split('\n')[1:3]] == ['full', 'distilled']
    assert re.match(r'full +\d+\.\d +\(1 network, calibration', out.split('\n')[1]) and '±' not in out
    assert [row['set'] for row in after['rows']] == ['full', 'distilled']
    assert after['rows'][1]['accs'] == before['rows'][0]['accs'][:1] # the first network has the run's seed
    assert {k for k in before if before[k] != after[k]} <= {'rows', 'seconds', 'peak_mib', 'test_uses'}
    done('evaluate', 'run', '--rows', 'distilled', '--nets', 1, '--bf16')
    assert read_json('run/result.json')['protocol'] == 'quick, bf16=True'

def test_two_evaluations_at_once(finished, monkeypatch):
    "The second waits for the first, and takes the record of the same request"
    ask, results, trained = partial(evaluate_run, 'run', n=1, rows=('distilled',)), [], []
    second = threading.Thread(target=lambda: results.append(ask()))
    def slow(*args, **kw):
        trained.append(second.start() or second.join(.8) or second.is_alive())
        return score(*args, **kw)
    monkeypatch.setattr('dreamplus.judge.evaluate.score', slow)
    with pytest.warns(UserWarning, match='is in use by another process'): first = ask()
    second.join()
    assert trained == [True] and results == [first] and first['test_uses'] == 2 # the first use was that of the run

def test_a_short_wait_needs_no_warning(here, recwarn):
    "as of two processes of one evaluation that store their results"
    held = threading.Event()
    def hold():
        with RunFolder(here/'cache').wait(): held.set(), time.sleep(.2)
    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    with RunFolder(here/'cache').wait(): other.join()
    assert not recwarn.list

def test_leftovers_of_a_cache(here, monkeypatch):
    "What a process that was killed while it wrote left behind goes with the next result"
    monkeypatch.setenv('DREAMPLUS_CACHE', str(here))
    folder = here/'baselines'
    folder.mkdir()
    if not (child := os.fork()):
        with atomic(folder/'a.json') as tmp: tmp.write_text('half'), os._exit(0)
    os.waitpid(child, 0)
    assert len([*folder.iterdir()]) == 1
    remember(dict(row='random'), lambda: .5)
    assert [p.suffix for p in folder.iterdir() if p.name != '.lock'] == ['.json']

def test_scores(finished):
    shutil.copytree('run', 'other')
    out = done('scores', 'run,other', '--archs', 'mlp,convnet', '--soft', 'kl', '--nets', 1)
    lines = [line.split() for line in out[out.index('method  ipc'):].split('\n')]
    assert lines[0] == ['method', 'ipc', 'factor', 'mlp', 'convnet']
    assert {lines[1][0], lines[2][0]} == {'dream+', 'random'}
    assert [line[:2] for line in lines[5:9]] == [[name, kind] for name in ('run', 'other') for kind in ('hard', 'kl')]
    assert read_json('other/scores.json')['test_uses'] == 2
    refused('scores', 'run,nowhere', says=['nowhere'])

def test_doctor(finished, here):
    "Exit status 1 with findings, 0 without; questions, real images, and what cannot be checked"
    ended = run('doctor', 'run')
    assert ended.status == 1 and '1. too few steps: the set has had 2 of the 200' in ended.out
    assert 'dreamplus resume RUN --outer 20' in ended.out
    made = read_json('run/distilled.json')
    made['provenance']['steps'] = 200
    write_json('run/distilled.json', made | dict(factor=2))
    assert '1. factor: the run has factor=1, but the set says 2' in run('doctor', 'run', '--data', 'digits').out
    write_json('run/distilled.json', made)
    ended = run('doctor', 'run', '--why', 'memory')
    assert ended.status == 1 and 'batch_real=8' in ended.out and '* compare fewer classes at a time' in ended.out
    (finished/'run.json').unlink(), (finished/'result.json').unlink() # a set alone
    ended = run('doctor', 'run')
    assert ended.status == 0 and 'not checked without --data: classes, labels\n' in ended.out
    assert 'digits: 10 classes' in run('doctor', 'run', '--data', 'digits').out
    assert 'torch ' in run('doctor').out and 'free_gib' in run('doctor', '--why', 'slow').out
    refused('doctor', 'nowhere', says=['nowhere does not exist'])
    refused('doctor', 'run', '--why', 'bored', says=["why='bored' is not a question"])

def test_resume_with_more_iterations_and_data_elsewhere(here):
    write_images(here/'toys')
    done(*TINY, 'toys', '--channels', 3, '--out', 'run')
    (here/'toys').rename(here/'moved')
    refused('resume', 'run', says=['--data FOLDER'])
    write_json('run/run.json', read_json('run/run.json') | dict(device='cuda:1'))
    said = done('resume', 'run', '--data', 'moved', '--outer', 3, '--nets', 0)
    assert f'resumed under other conditions (device: cuda:1 then, {pick_device()} now' in said
    assert read_json('run/distilled.json')['provenance']['steps'] == 6
    done(*TINY, 'moved', '--channels', 3, '--start', 'run', '--ipc', 2, '--out', 'next')
    assert read_json('next/run.json')['earlier'] == str(here/'run')

def test_show(finished):
    (finished/'grid.png').unlink()
    out = done('show', 'run')
    assert 'run/grid.png' in out and 'distilled ' in out
    grid = Image.open('run/grid.png')
    done('show', 'run', '--decoded', '--out', 'decoded.png')
    assert Image.open('decoded.png').size == grid.size # factor 1
    (finished/'result.json').unlink()
    assert 'distilled ' not in done('show', 'run')

def test_accuracies_of_replaced_images_are_not_shown(finished):
    "A run that continues after its evaluation has other images"
    done('resume', 'run', '--outer', 2, '--nets', 0)
    assert done('show', 'run').endswith('were not evaluated yet; `dreamplus evaluate run` does it\n')
    assert 'not checked without `dreamplus evaluate RUN`' in run('doctor', 'run').out
    refused('leaderboard', 'run', says=['run was evaluated before its images were replaced'])
    done('evaluate', 'run', '--rows', 'distilled', '--nets', 1)
    assert 'distilled ' in done('show', 'run') and 'dream+' in done('leaderboard', 'run')

def test_show_decoded():
    done(*TINY, '--factor', 2, '--out', 'run')
    done('show', 'run', '--decoded')
    stored, decoded = (Image.open(f'run/{name}.png') for name in ('grid', 'decoded'))
    assert decoded.size[0]*decoded.size[1] > 2*stored.size[0]*stored.size[1]

def test_resume_of_a_finished_run(finished):
    before, made = contents(finished), read_json('run/distilled.json')['provenance']
    out = done('resume', 'run', '--nets', 2)
    assert out.startswith('run is finished already')
    changed = {p.name for p, content in contents(finished).items() if before.get(p) != content}
    assert changed <= {'distilled.json', 'state.safetensors', 'result.json'} # which hold the seconds spent
    assert read_json('run/distilled.json')['provenance']['seconds'] > .9*made['seconds'] # of all sessions
    assert out.rstrip('\n').split('\n')[-1].endswith('run')
    (finished/'result.json').unlink()
    done('resume', 'run', '--nets', 0)
    assert not (finished/'result.json').exists()

def test_watching_changes_nothing():
    data, args = load_data(valid=.2), dict(log=None, outer=1, inner=3, width=8, n_data=32, batch_real=8)
    plain, watched = (distill(data, 'dream+', metrics=m, **args) for m in ([], [ValidAccuracy()]))
    assert torch.equal(plain.pixels, watched.pixels)

def test_set_reaches_the_recipe():
    done(*TINY, *'--set lr=.5 --set distance=cos --set warm_epochs=0.5 --match gradient --out run'.split())
    given = dict(lr=.5, distance='cos', warm_epochs=.5, match='gradient', n_data=32, outer=1, width=8)
    assert given.items() <= read_json('run/run.json')['args'].items()

def test_budgets():
    "In inner iterations; in minutes, whatever the recipe's outer iterations are"
    done(*TINY, '--outer', 5, '--steps', 3, '--out', 'steps')
    assert read_json('steps/distilled.json')['provenance']['steps'] == read_history('steps')[-1]['step'] == 3
    done(*TINY[:3], *TINY[5:], '--minutes', '.005', '--out', 'minutes')
    made = read_json('minutes/distilled.json')['provenance']
    assert .3 <= made['seconds'] < 10 and made['steps'] == read_history('minutes')[-1]['step']
    done(*TINY[:3], *TINY[5:], '--minutes', '1e-9', '--out', 'short') # the initial images take longer than that
    assert [row['step'] for row in read_history('short')] == [1]

# Help

def test_methods():
    table = done('methods').split('\n')
    assert [line.split()[0] for line in table[1:-1]] == [*METHODS]
    assert json.loads(done('methods', '--json'))['dream+']['args']['warm_epochs'] == 1

def test_help_lists_the_arguments_of_all_parts(monkeypatch):
    "also of one that was registered a moment ago"
    class Mine(EmbeddingMatcher):
        def __init__(self, freqs: int = 64): super().__init__()
    monkeypatch.setitem(MATCHERS, 'mine', Mine)
    for name in 'distill', 'compare', 'plan':
        said = done(name, '--help')
        listed = {line.split('=')[0].strip() for line in said.split('\n') if line.startswith('  ') and '=' in line}
        assert {a for part in all_parts().values() for a in arguments(part)} <= listed
        assert "match='mine':\n  freqs=64 " in said

@pytest.mark.parametrize('name', COMMANDS)
def test_help(name):
    sub = make_parser(COMMANDS, name)._subparsers._group_actions[0].choices[name]
    for action in sub._actions: assert action.help and action.help.strip(), action
    for argv in ([name, '--help'], ['--help']):
        said = ' '.join(done(*argv).split())
        assert COMMANDS[name].__doc__ in said and name in said

@pytest.mark.parametrize('argv, says', [
    ('distil', 'did you mean distill?'), ('reprodcue --list', 'did you mean reproduce?'), ('xyz', 'use one of distill'),
    ('distill --widht 8', 'takes no option --widht; did you mean --width?'),
    ('distill --nonsense=1', 'takes no option --nonsense; see `dreamplus distill --help`'),
    ('distill --ipc x', "--ipc: 'x' is not a whole number"), ('distill --minutes x', "'x' is not a number"),
    ('show', 'required: RUN; see `dreamplus show --help`'), ('distill a b', "takes no argument 'b'"),
    (f'distill --ipc {"["*3000}', '...'), ('evaluate --nets', '--nets: expected one argument'),
    ('--nonsense', 'see `dreamplus --help`')])
def test_usage(argv, says): refused(*argv.split(), says=[says])

def test_empty_options_are_refused():
    for argv in ['distill', ''], ['distill', '--out', ''], ['evaluate', '']:
        refused(*argv, says=['is empty; leave it out'])

def test_a_refused_command_says_its_error_only(here):
    "A warning waits for the first output"
    (write_images(here/'toys')/'class0'/'notes.txt').write_text('mine')
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        refused(*TINY, 'toys', '--set', 'bacth_real=8', says=['did you mean'])
        ended = run(*TINY, 'toys', '--channels', 3, '--out', 'run')
    assert ended.err.startswith('warning: ') and 'notes.txt' in ended.err.split('\n')[0]

def test_alone():
    assert done().startswith('usage: dreamplus') and done('--version') == f'dreamplus {__version__}\n'

def test_output_that_nobody_reads(here):
    "A closed or broken output ends no command; a full disk is said at the end"
    env, (reader, writer) = os.environ | dict(PYTHONPATH=str(ROOT)), os.pipe()
    os.close(reader)
    def shell(redirect, **kw):
        command = shlex.join([sys.executable, '-m', 'dreamplus', '--help'])
        ended = subprocess.run(f'{command} {redirect}', shell=True, stderr=subprocess.PIPE, text=True, env=env, **kw)
        return ended.returncode, ended.stderr
    assert shell('', stdout=writer) == shell('>&-') == (0, '')
    assert shell('>out 2>&-') == (0, '') and (here/'out').read_text().startswith('usage: dreamplus')
    assert shell('>/dev/full') == (2, 'dreamplus: error: standard output: No space left on device; '
                                      'free some space there, or write to another disk\n')

@pytest.mark.parametrize('verbose', [True, False])
def test_faults_of_our_own(monkeypatch, verbose):
    "are a line to report; `--verbose` adds the traceback"
    monkeypatch.setitem(COMMANDS, 'methods', lambda: {}['width'])
    ended = run('methods', *['--verbose']*verbose)
    assert ended.status == 3
    assert ended.err.split('\n')[-2].startswith("dreamplus: error: a fault of dreamplus: KeyError: 'width'")
    assert ('Traceback' in ended.err) == verbose

@pytest.mark.parametrize('error', [MemoryError(), RuntimeError('DefaultCPUAllocator: can\'t allocate memory'),
                                   OSError(12, 'Cannot allocate memory')])
def test_too_little_memory(monkeypatch, error):
    def fails(): raise error
    monkeypatch.setitem(COMMANDS, 'methods', fails)
    refused('methods', says=['this does not fit into memory; use a smaller --ipc, --width or --size'])

def test_every_refusal_has_a_remedy():
    "In the package, a message of `ValueError` or `TypeError` says what to do"
    remedy = re.compile(r'; |\b(must|needs|use|give)\b')
    completed = re.compile(r'[{}:, ]*$|it is a|its image is a|it has no rows') # by the caller, with file and remedy
    def text(node):
        if isinstance(node, ast.JoinedStr): return ''.join(map(text, node.values))
        return str(node.value) if isinstance(node, ast.Constant) else '{}'
    for path in sorted((ROOT/'dreamplus').rglob('*.py')):
        if path.name == 'files.py': continue # `read_checked` adds the remedy
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call): continue
            if ast.unparse(node.exc.func) not in ('ValueError', 'TypeError'): continue
            said = ' '.join(map(text, node.exc.args))
            known = remedy.search(said) or completed.match(said) or 'wrong' in ast.unparse(node.exc)
            assert known, f'{path.name}: {said}'

def test_offline(here, monkeypatch):
    (here/'root').mkdir()
    for name in 'http_proxy', 'https_proxy': monkeypatch.setenv(name, 'http://127.0.0.1:9')
    says = ['mnist cannot be read', 'train-images-idx3-ubyte.gz', 'root/MNIST/raw']
    refused('distill', 'mnist', '--root', 'root', says=says)

# Arguments that are refused

@pytest.mark.parametrize('argv, says', [
    ('cifar', "'cifar' is not a dataset name"), ('--method dreem', "did you mean 'dream'?"),
    ('--arch vgg', 'use one of convnet'), ('--ipc 0', 'ipc=0 must be'), ('--ipc 200', "class '8' has 122"),
    ('--ipc 2 --factor 9', 'factor=9 must be a whole number from 1 to 4'), ('--factor 0', 'factor=0 must be'),
    ('--factor x', 'factor must be int'), ('--factor 1.5', 'factor=1.5 must be'),
    ('mnist --root nowhere', "root='nowhere' is not a folder"), ('--outer 0', 'outer=0 must be'),
    ('--start telepathy', 'use one of noise'), ('--sampler all', 'use one of random, representative'),
    ('--match telepathy', "match='telepathy' is unknown"), ('--match 3*', "match='' is unknown"),
    ('--match x*dm', 'gradient + 0.5*embedding'), ('--valid 2', 'valid=2.0 must lie between 0 and 1'),
    ('--valid nan', 'between'), ('--seed -1', 'seed'), ('--device nope', 'use cpu'),
    ('--device cuda:99', 'not available on this machine'), ('--nets -1', 'nets=-1 must be'),
    ('--protocol slow', 'use one of quick, dcbench, paper'), ('--size 0', 'size=0 must be'),
    ('--steps 0', 'steps=0 must be above 0'), ('--minutes -1', 'minutes=-1.0 must be'),
    ('--minutes nan', 'minutes=nan must'),
    ('--steps 1 --minutes 1', 'give one of them'), ('--set nonsense=1', "'nonsense' is not an argument"),
    ('--set bacth_real=8', "did you mean 'batch_real'?"), ('--set lr', 'must be NAME=VALUE'),
    ('--set =3', "'' is not an argument"), ('--arch resnetap10', 'use a ConvNet'),
    ('--width 1000000000000', 'this does not fit into memory; use a smaller --ipc, --width or --size'),
    ('--out .', 'use another --out'), ('--out taken', 'taken is a file'), ('--out taken/run', 'taken')])
def test_arguments_refused(here, argv, says):
    (here/'taken').write_text('mine')
    refused(*TINY, *argv.split(), says=[says])

@pytest.mark.parametrize('pair', [
    'lr=abc', 'lr=NaN', 'lr=-1', 'lr=true', 'lr_base=0', 'momentum=1', 'inner=1.5', 'warm_epochs=inf', 'net_mix=7',
    'chunk=-1', 'match=3', 'sampler=[]', 'distance=foo', 'rule=foo', 'decode=foo', 'pick=two',
    'norm=foo', 'depth=9', 'subsample=3', 'augment=foo', 'net_augment=foo', 'eval_augment=foo', # what a part says
    'data=1', 'method=idc', 'ipc=2', 'seed=1', 'device=cpu', 'out=elsewhere', 'cbs=1', 'log=0', 'steps=1', 'metrics=1'])
def test_set_refused(pair):
    name, _, value = pair.partition('=')
    refused(*TINY, '--out', 'run', '--set', pair, says=[value if value == 'foo' else name])

def test_every_argument_has_a_type():
    "A value of the wrong kind is refused before any work, whichever argument it is for"
    for name in recipe('dream+', 'digits'):
        with pytest.raises((TypeError, ValueError), match=name): recipe('dream+', 'digits', **{name: {}})

@pytest.mark.parametrize('argv, says', [
    ('compare --ipc null', 'not a list of whole numbers'), ('compare --seeds [1]', 'not a list of whole numbers'),
    ('compare --methods dm --minutes 0', 'minutes=0.0 must be'), ('compare --steps 1 --minutes 1', 'minutes=1.0'),
    ('study iterations --steps 0', 'steps=0 must be'), ('study iterations --every -1', 'every=-1 must be'),
    ('study iterations --warms 0,-1', 'warm=-1 must be'), ('study iterations --warms null', 'not a list of numbers'),
    ('study iterations --set start=noise', 'start'), ('experts --n 0', 'n=0 must be'),
    ('plan --ipc 0', 'ipc=0 must be'), ('reproduce dream+/cifar11', "'dream+/cifar11'")])
def test_commands_refused(here, argv, says): refused(*shlex.split(argv), says=[says])

def test_experts(here):
    make = 'experts', 'digits', '--n', 2, '--epochs', 1, '--width', 4, '--zca', '--out', 'e'
    assert '2 experts in e; `--experts e` uses them' in done(*make)
    before = {p: b for p, b in contents().items() if p.suffix == '.safetensors'}
    assert len(before) == 2
    assert 'flip' not in read_json('e/experts.json')['training']['augment'] # a mirrored digit is none
    Path('e/expert_0001.safetensors').unlink()
    done(*make)
    assert {p: b for p, b in contents().items() if p.suffix == '.safetensors'} == before

@pytest.mark.parametrize('argv, says', [
    ('evaluate run --rows distilled,magic', "'magic' is unknown"), ('evaluate run --nets 0', 'n=0 must be'),
    ('evaluate run --protocol slow', "protocol='slow' is unknown"), ('evaluate run --device nope', 'use cpu'),
    ('resume run --protocol slow', "protocol='slow' is unknown"), ('resume run --nets -1', 'nets=-1 must be'),
    ('show run --out nowhere/a.png', 'nowhere'), ('show run --out .', ''),
    (shlex.join([*TINY, '--out', 'run']), 'run holds a run already; `dreamplus resume run`')])
def test_refused_of_a_run(finished, argv, says): refused(*shlex.split(argv), says=[says])

# Folders of images

X, Y = toy_images(classes=3, per_class=6, channels=3)

def write_images(folder, counts=(6, 6, 6)):
    for c, n in enumerate(counts):
        (folder/f'class{c}').mkdir(parents=True)
        for i in range(n): picture(X[6*c + i]).save(folder/f'class{c}'/f'{i}.png')
    return folder

def picture(x): return Image.fromarray(x.permute(1, 2, 0).numpy())

def spoil(folder, what):
    bad = folder/'class1'/'bad.jpg'
    if what == 'one class': shutil.rmtree(folder/'class0'), shutil.rmtree(folder/'class1')
    if what == 'empty class': (folder/'class3').mkdir()
    if what == 'truncated': picture(X[0]).save(bad), os.truncate(bad, 500)
    if what == 'channels': picture(X[0]).convert('L').save(bad)
    if what == 'sizes': picture(X[0]).resize((12, 12)).save(bad)
    if what == 'no classes': shutil.rmtree(folder), folder.mkdir()

@pytest.mark.parametrize('what, says', {
    'one class': ['one class only'], 'empty class': ['class3 holds no images'], 'no classes': ['no class folders'],
    'truncated': ['bad.jpg cannot be decoded'], 'channels': ['bad.jpg', '--channels 3'],
    'sizes': ['bad.jpg is 12x12', '--size']}.items())
def test_folder_refused(here, what, says):
    spoil(write_images(here/'toys'), what)
    refused(*TINY, 'toys', '--out', 'run', says=says)

def test_folder_as_asked(here):
    toys = write_images(here/'toys')
    spoil(toys, 'channels'), picture(X[0]).resize((12, 12)).save(toys/'class2'/'large.png')
    out = done(*TINY, 'toys', '--size', 8, '--channels', 3, '--out', 'run')
    assert 'toys: 3 classes of 3x8x8' in out
    assert load_state('run/distilled.safetensors')['pixels'].shape == (3, 3, 8, 8)
    shutil.rmtree(toys)
    refused('resume', 'run', says=['toys, which does not exist here', '--data FOLDER'])

def test_recipe_with_constants_of_its_own(here, monkeypatch):
    monkeypatch.setitem(DATASETS, 'toys', Dataset(like='cifar100')) # whose recipe normalises as for CIFAR-10
    write_images(here/'toys'), write_images(here/'cifar100')
    for name in 'toys', 'cifar100': done(*TINY, f'./{name}', '--out', f'run-{name}')
    assert read_json('run-toys/distilled.json')['mean'] == pytest.approx([.4914, .4822, .4465])
    mean = load_data('./toys').mean.flatten().tolist() # three classes are not CIFAR-100
    assert read_json('run-cifar100/distilled.json')['mean'] == pytest.approx(mean)

def test_folder_too_small_for_ipc(here):
    write_images(here/'toys', (6, 2, 6))
    refused(*TINY, 'toys', '--factor', 2, '--out', 'run', says=["class 'class1' has 1"])

@pytest.mark.parametrize('x, y', [(X, Y + .5), (X, Y.float()*torch.nan), (X, ['a']*18), (X/255*torch.nan, Y)])
def test_arrays_refused(x, y):
    with pytest.raises(ValueError, match='whole numbers|must lie in'): load_data((x, y))

# Run folders that are none, and those of others

@pytest.mark.parametrize('name', ['evaluate', 'show', 'resume'])
@pytest.mark.parametrize('what', ['missing', 'a file', 'other things'])
def test_no_run(here, name, what):
    if what == 'a file': (here/'run').write_text('mine')
    if what == 'other things': (here/'run').mkdir(), (here/'run'/'thesis.txt').write_text('mine')
    refused(name, 'run', says=['run'])

@pytest.mark.parametrize('text', ['', '{', '[]', '{"format": 9}', '{"format": 1}', '\x00\xff'])
def test_damaged_run(finished, text):
    (finished/'run.json').write_text(text, encoding='latin1')
    for name in ('evaluate', 'resume'): refused(name, 'run', says=['run'])

@pytest.mark.parametrize('file, names', {
    'distilled.safetensors': ['evaluate', 'show'], 'distilled.json': ['evaluate', 'show'], 'result.json': ['show'],
    'checkpoint/state.safetensors': ['resume']}.items())
def test_truncated_file(finished, file, names):
    os.truncate(finished/file, (finished/file).stat().st_size//2)
    for name in names: refused(name, 'run', says=[Path(file).name])

@pytest.mark.parametrize('file, path, names', [
    ('run.json', ['data'], ['evaluate', 'scores', 'resume']), ('run.json', ['args', 'width'], ['resume']),
    ('run.json', ['versions'], ['evaluate']), ('distilled.json', ['evaluation', 'arch'], ['evaluate']),
    ('distilled.json', ['mean'], ['evaluate']), ('result.json', ['rows', 0], ['show'])])
def test_edited_run(finished, monkeypatch, file, path, names):
    "What was changed by hand ends in a line, or does no harm, whatever it was"
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=0, steps=1))
    argv = dict(show=[], evaluate=['--nets', 1, '--rows', 'distilled'], scores=['--nets', 1, '--archs', 'mlp'],
                resume=['--nets', 0])
    good, said = read_json(finished/file), []
    for value in None, 'x', {}, [], -1:
        record = entry = copy.deepcopy(good)
        for key in path[:-1]: entry = entry[key]
        entry[path[-1]] = value
        write_json(finished/file, record)
        if file != 'result.json': (finished/'result.json').unlink(missing_ok=True) # it would answer
        said += [run(name, 'run', *argv[name]) for name in names] # a traceback would end this test
    assert {ended.status for ended in said} <= {0, 2} and any(ended.status for ended in said)
    assert all(ended.err.split('\n')[-2].startswith('dreamplus: error: ') for ended in said if ended.status)

def test_other_version(finished):
    info = read_json('run/run.json')
    info['versions']['dreamplus'] = '9.9'
    write_json('run/run.json', info)
    refused('resume', 'run', says=['started by dreamplus 9.9', 'pip install dreamplus==9.9'])
    done('evaluate', 'run', '--rows', 'distilled', '--nets', 1)

def test_unfinished(finished):
    (finished/'distilled.json').unlink()
    for name in ('evaluate', 'show'): refused(name, 'run', says=['distilled', 'dreamplus resume run'])

def test_run_of_python_objects():
    distill(load_data((X, Y)), 'dream+', out='run', log=None, outer=1, inner=1, width=8, batch_real=4)
    for name in ('resume', 'evaluate'): refused(name, 'run', says=['Python objects'])

def test_not_empty(here):
    (here/'run').mkdir(), (here/'run'/'thesis.txt').write_text('mine')
    refused(*TINY, '--out', 'run', says=['run holds files', 'use another --out'])

@pytest.fixture
def held(here):
    "`run/`, locked by another process"
    (here/'run').mkdir(exist_ok=True)
    code = 'import filelock; lock = filelock.FileLock("run/.lock"); lock.acquire(); print("held", flush=True); input()'
    holder = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'held\n'
    yield here/'run'
    holder.communicate('\n')

def test_being_resumed_elsewhere(finished, held): refused('resume', 'run', says=['being written by another process'])

def test_being_begun_elsewhere(held):
    refused(*TINY, '--out', 'run', says=['being written by another process'])
    lock = FileLock(held/'.lock', timeout=0)
    with pytest.raises(TimeoutError): lock.acquire() # it is still theirs

# Things that go wrong on the way

def test_diverged():
    ended = run(*TINY, '--set', 'lr=1e30', '--inner', 5, '--out', 'run')
    assert_one_line(ended.status, ended.err, 'not finite at inner iteration', 'smaller lr')
    assert load_state('run/checkpoint/state.safetensors')['model']['pixels'].isfinite().all()
    assert not Path('run/distilled.json').exists() and not [*Path('run').rglob('.*.tmp')]
    again = run('resume', 'run')
    assert (again.status, again.err) == (2, ended.err) # it goes on, and meets the same

@pytest.mark.parametrize('inner', [2, 4]) # in the last inner iteration; before another
def test_last_good_state(inner):
    ended = run(*TINY, '--set', 'lr=1e39', '--inner', inner, '--checkpoint_seconds', 0, '--out', 'run')
    assert_one_line(ended.status, ended.err, 'not finite')
    assert load_state('run/checkpoint/state.safetensors')['model']['pixels'].isfinite().all()
    assert not Path('run/distilled.json').exists()

def test_full_disk(monkeypatch):
    "ends in a line, wherever it is; once there is room, the run goes on where it was"
    replace, argv = os.replace, [*TINY, '--out', 'run']
    distilled = 'distilled.safetensors', 'distilled.json'
    for name in 'state.safetensors', 'history.csv', 'grid.png', *distilled, 'result.json':
        def full(tmp, path, name=name):
            if Path(path).name == name: raise OSError(28, 'No space left on device', str(path))
            replace(tmp, path)
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', full)
            ended = run(*argv, '--nets', 1)
        says = f'{name}: No space left on device; free some space'
        assert_one_line(ended.status, ended.err.split('done\n')[-1], 'run/', says)
        assert not [*Path('run').rglob('.*.tmp')]
        argv = ['resume', 'run']
    done(*argv, '--nets', 1)
    assert Path('run/result.json').exists()

@pytest.mark.parametrize('size', [100, 3000]) # too small for run.json; for a checkpoint
def test_file_too_large(here, size):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: ended = run(*TINY, '--out', 'runs/a')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert_one_line(ended.status, ended.err, 'File too large', 'run.json' if size == 100 else 'state.safetensors')
    if size == 100: assert not [*here.iterdir()]
    else:
        assert sorted(p.name for p in contents(here/'runs'/'a')) == ['checkpoint', 'run.json', 'start.safetensors']
        done('resume', 'runs/a', '--nets', 0)

def test_images_that_no_row_can_have(monkeypatch):
    "A set larger than a class has no rows of real images of equal storage"
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=0, steps=1))
    done(*TINY, '--start', 'noise', '--ipc', 123, '--set', 'limit=2', '--nets', 1, '--out', 'run')
    assert [row['set'] for row in read_json('run/result.json')['rows']] == ['distilled', 'start', 'full']
