"A trial of each kind of `python -m tests.campaign`, and that it sees what goes wrong."
from types import SimpleNamespace

import campaign
import pytest

def test_nothing_goes_wrong():
    counts, found = campaign.campaign(trials=1)
    assert found == [] and {row['trials'] for row in counts.values()} == {1} and counts.keys() == campaign.KINDS.keys()

def ended(status=2, err='dreamplus: error: a.json is damaged; restore it\n'):
    return SimpleNamespace(argv=[], status=status, out='', err=err)

@pytest.mark.parametrize('what, given', {
    'tracebacks': ended(3, 'dreamplus: error: a fault of dreamplus: KeyError\n'), 'wrong exit statuses': ended(1),
    'messages without file or remedy': ended(err='dreamplus: error: something is damaged; restore it\n')}.items())
def test_an_ended_command_is_judged(tmp_path, what, given):
    campaign.check(ended(), tmp_path, set(), ['a.json'])
    with pytest.raises(campaign.Fault) as e: campaign.check(given, tmp_path, set(), ['a.json'])
    assert e.value.args[0] == what

def test_what_is_left_is_seen(tmp_path):
    (tmp_path/'new').mkdir()
    campaign.check(ended(0), tmp_path, set())
    with pytest.raises(campaign.Fault, match='leftovers'): campaign.check(ended(), tmp_path, set())
    (tmp_path/'.dreamplus-x.tmp').mkdir()
    with pytest.raises(campaign.Fault, match='leftovers'): campaign.check(ended(0), tmp_path, set())

def test_a_function_that_breaks_is_seen(monkeypatch, tmp_path):
    "also one that never ends"
    def broken(argv): raise KeyError('width')
    monkeypatch.setattr(campaign, 'main', broken)
    with pytest.raises(campaign.Fault, match='tracebacks'): campaign.run(['methods'])
    monkeypatch.setattr(campaign, 'main', lambda argv: campaign.time.sleep(9))
    monkeypatch.setattr(campaign, 'LIMIT', .05)
    with pytest.raises(campaign.Fault, match='hangs'): campaign.run(['methods'])
