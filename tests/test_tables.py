"Tables in a terminal and in a file: what fits, what stays whole, and what no width or variable changes."
import io
import os
import pty
import re
import termios
from contextlib import redirect_stdout, suppress

import pytest
from rich.cells import cell_len

from dreamplus.recipes import methods_table
from dreamplus.tables import markdown_table, plain_tables, print_tables

SCORES = markdown_table(['method', 'set', *(f'accuracy of network {n}' for n in 'abcdef')],
                        [['dream+, factor 2', 'of the run', *['93.4 ± 1.3']*6],
                         ['random', 'real', *['69.2 ± 6.2']*6]])
CLASSES = markdown_table(['class', 'images', 'note'], [['狗狗狗', 3, '[mine] :smile: [/]'], ['[red]x', 100, '猫']])

def printed(text):
    with redirect_stdout(io.StringIO()) as out: print_tables(text)
    return out.getvalue()

@pytest.mark.parametrize('width', [40, 60, 80, 100])
@pytest.mark.parametrize('text', [methods_table(), SCORES, CLASSES], ids=['methods', 'scores', 'classes'])
def test_fits_with_words_and_numbers_whole(text, width):
    lines = plain_tables(text, width).split('\n')
    assert max(map(cell_len, lines)) <= width
    words = lambda s: {w for w in re.split(r'[\s|]+', s.replace('`', '')) if w and w != '---'}
    assert words(' '.join(lines)) == words(text)
    assert set(re.findall(r'\d+\.\d ± \d\.\d', text)) == set(re.findall(r'\d+\.\d ± \d\.\d', '\n'.join(lines)))

def test_methods_are_one_table_of_80_columns():
    assert '\n\n' not in plain_tables(methods_table(), 80)

def test_a_divided_table_repeats_the_names():
    first, *others = plain_tables(SCORES, 60).split('\n\n')
    assert others and {part.split()[0] for part in others} == {'method'}
    assert [part.count('random') for part in [first, *others]] == [1]*(1 + len(others))

def test_cells_are_not_markup():
    assert {'[mine] :smile: [/]', '[red]x'} <= set(re.split(r'\n| {2,}', plain_tables(CLASSES)))

def test_chinese_characters_are_two_columns_wide():
    ends = [cell_len(line[:re.search(r'images|3|100', line).end()]) for line in plain_tables(CLASSES).split('\n')]
    assert len(set(ends)) == 1

@pytest.mark.parametrize('setting', ['COLUMNS=30', 'FORCE_COLOR=1', 'TERM=dumb', 'NO_COLOR=1'])
def test_a_file_gets_the_same_text_everywhere(monkeypatch, setting):
    plain = printed(f'{SCORES}\n\n{CLASSES}')
    monkeypatch.setenv(*setting.split('='))
    assert printed(f'{SCORES}\n\n{CLASSES}') == plain
    assert '\x1b' not in plain and not re.search(r' $', plain, re.M) and max(map(len, plain.split('\n'))) > 100

@pytest.mark.parametrize('term', ['xterm-256color', 'dumb'])
def test_a_terminal(monkeypatch, term):
    ours, theirs = pty.openpty()
    monkeypatch.delenv('COLUMNS', raising=False)
    monkeypatch.setenv('TERM', term)
    termios.tcsetwinsize(theirs, (24, 50))
    with open(theirs, 'w', encoding='utf-8') as out:
        monkeypatch.setattr('sys.__stdout__', out) # whose size is asked for
        with redirect_stdout(out): print_tables(SCORES)
    seen = b''
    with suppress(OSError): # at its end
        while part := os.read(ours, 65536): seen += part
    os.close(ours)
    assert seen.decode().replace('\r\n', '\n') == plain_tables(SCORES, 50) + '\n'
