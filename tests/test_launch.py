"torchrun itself, in processes that import everything: they need no server, and run beside the tests that wait for one"
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from torch.distributed.run import get_args_parser

from dreamplus.cli import COMMANDS
from dreamplus.data.sources import load_data
from dreamplus.loop.distill import distill
from dreamplus.options import parse_command

ONCE = dict(outer=3, inner=1, width=8, batch_real=8)

class TraceCB(Callback):
    "Of the program that calls"

def test_from_a_notebook(tmp_path):
    "A child with two processes shows its progress, and its set has the same pixels"
    lines, digits = [], load_data('digits')
    args = ONCE | dict(log=lines.append, report=1)
    found = distill(digits, 'dm', out=tmp_path/'run', processes=2, **args)
    assert torch.equal(found.pixels, distill(digits, 'dm', chunk=1, log=None, **ONCE).pixels) # of a process alone
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ['1', '2', '3']
    assert {'log-0.txt', 'log-1.txt'} <= {p.name for p in (tmp_path/'run').iterdir()}
    with pytest.raises(ValueError, match='cannot use TraceCB'):
        distill(load_data('digits'), 'dm', processes=2, cbs=[TraceCB()], **ONCE)

JOB = dict(SLURM_JOB_NODELIST='one,two', SLURM_JOB_ID='123456', SLURM_NNODES='2', SLURM_CPUS_PER_TASK='8')
STUBS = dict(scontrol='printf "one\\ntwo\\n"', srun='until [ "$1" = torchrun ]; do shift; done; exec "$@"',
             torchrun='echo "$OMP_NUM_THREADS"; printf "%s\\n" "$@"')

def test_the_slurm_script_of_the_guide(tmp_path):
    "torchrun and dreamplus understand what it passes; a second job continues the run"
    page = json.loads((Path(__file__).parents[1]/'nbs'/'guides'/'processes.ipynb').read_text(encoding='utf-8'))
    text = next(t for t in map(''.join, (c['source'] for c in page['cells'])) if '#SBATCH' in t)
    script = re.search('(#!/bin/bash.*?)```', text, re.DOTALL)[1].replace('/shared', str(tmp_path))
    for name, body in STUBS.items():
        (tmp_path/name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path/name).chmod(0o755)
    def words():
        env = os.environ | JOB | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}')
        threads, *argv = subprocess.run(['bash', '-eu', '-c', script], env=env, capture_output=True, text=True,
                                        check=True).stdout.splitlines()
        asked = get_args_parser().parse_args(argv)
        assert (threads, asked.nnodes, asked.rdzv_endpoint, asked.rdzv_id) == ('2', '2', 'one:23456', '123456')
        assert asked.module and asked.training_script == 'dreamplus'
        return parse_command(COMMANDS, asked.training_script_args)[:2]
    command, kw = words()
    assert command == 'distill' and kw['out'] == f'{tmp_path}/runs/imagenet'
    (tmp_path/'runs'/'imagenet').mkdir(parents=True)
    (tmp_path/'runs'/'imagenet'/'run.json').touch()
    assert words() == ('resume', words()[1]) and words()[1]['run'] == kw['out']
