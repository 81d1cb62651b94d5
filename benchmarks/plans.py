"""Seconds and peak memory as planned, divided by those of the run.

    python -m benchmarks.plans --out plans.json digits
    python -m benchmarks.plans --root DATA mnist,width=32,outer=2,inner=10 DATA/cifar10-jpeg,width=32,outer=1,inner=10

Each argument is a dataset and arguments of `distill`. Plan and run have a process each and no cache.
"""
import json
import subprocess
import sys
import tempfile

from dreamplus.core import write_json

from . import head, make_parser

SETUP = """
import json, os, sys, time
from pathlib import Path
from dreamplus.machine import keep_memory, peak_mib, pick_device
keep_memory()
from dreamplus.loop.distill import distill
from dreamplus.judge.evaluate import evaluate_run
from dreamplus.labs.plan import plan
from dreamplus.data.sources import load_data
name, root, args = json.loads(sys.argv[1])
data = load_data(name, root=root)
"""
PLAN = SETUP + """
found = plan(data, **args, nets=1)
print(json.dumps(dict(seconds=found['seconds'], peak_mib=found['peak_mib'], parts=found['parts'], data=data.digest)))
"""
RUN = SETUP + """
out = Path(sys.argv[2])/'run'
start = time.perf_counter()
distill(data, **args, out=out, log=None)
distilled = time.perf_counter()
evaluate_run(out, data, n=1, cache=False)
print(json.dumps(dict(seconds=dict(distill=distilled - start, evaluate=time.perf_counter() - distilled),
                      peak_mib=peak_mib(pick_device('cpu')))))
"""

def value(text):
    "A number, or text"
    try: return json.loads(text)
    except ValueError: return text

def check(job, root):
    "Plan and run a job, and compare"
    name, *pairs = job.split(',')
    args = {k: value(v) for k, v in (p.split('=') for p in pairs)}
    said = {}
    for what, code in (('plan', PLAN), ('run', RUN)):
        with tempfile.TemporaryDirectory() as folder:
            run = [sys.executable, '-W', 'ignore', '-c', code, json.dumps([name, root, args]), folder]
            said[what] = json.loads(subprocess.run(run, check=True, text=True, stdout=subprocess.PIPE).stdout)
    ratio = {k: said['plan']['seconds'][k]/said['run']['seconds'][k] for k in ('distill', 'evaluate')}
    total = sum(said['plan']['seconds'][k] for k in ratio)/sum(said['run']['seconds'].values())
    peak = said['plan']['peak_mib']/said['run']['peak_mib']
    return dict(job=job.split('/')[-1], ratio=ratio | dict(total=total, peak=peak), **said)

def main():
    parser = make_parser('benchmarks.plans', __doc__, 'plans.json')
    parser.add_argument('jobs', nargs='+')
    parser.add_argument('--root', help='folder of downloaded datasets')
    a = parser.parse_args()
    checks = []
    for job in a.jobs:
        checks.append(check(job, a.root))
        print(checks[-1]['job'], {k: round(v, 2) for k, v in checks[-1]['ratio'].items()}, flush=True)
        data = {c['job'].split(',')[0]: c['plan']['data'] for c in checks}
        write_json(a.out, head(data, [0]) | dict(checks=checks))

if __name__ == '__main__': main()
