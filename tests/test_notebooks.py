"The notebooks are the source: the modules are what they export, they are clean, they read well, and pages can be made of them."
import json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
notebooks = sorted((root/'nbs').rglob('*.ipynb'))

@pytest.fixture
def tree(tmp_path):
    "A copy of what nbdev reads and writes"
    for d in ('nbs','fastai_bs_finder'):
        shutil.copytree(root/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints'))
    for f in ('settings.ini','pyproject.toml','README.md'): shutil.copy(root/f, tmp_path)
    return tmp_path

def contents(path):
    files = (f for d in ('nbs','fastai_bs_finder') for f in sorted((path/d).rglob('*')) if f.is_file())
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in files if '__pycache__' not in f.parts}

def nbdev(code, cwd): return subprocess.run([sys.executable, '-c', code], cwd=cwd, check=True, capture_output=True, text=True)

def assert_unchanged(before, after, command):
    changed = sorted(f for f in before|after if before.get(f) != after.get(f))
    assert not changed, f"run {command} and commit: {changed}"

def cells(nb, kind): return [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]
def exported(nb): return [s for s in (''.join(c['source']) for c in cells(nb, 'code')) if re.match(r'#\| ?export', s)]

@pytest.mark.parametrize('command', ['export','clean'])
def test_nothing_left_to_do(tree, command):
    before = contents(tree)
    assert len([f for f in before if f.endswith('.ipynb')]) >= 5
    nbdev(f'from nbdev.{"cli" if command=="export" else "clean"} import nbdev_{command}; nbdev_{command}()', tree)
    assert_unchanged(before, contents(tree), f'nbdev-{command}')

@pytest.mark.slow
def test_pages_can_be_made(tree):
    "`nbdev-proc-nbs`, but for Quarto: every notebook becomes a page that the sidebar shows"
    before = contents(tree)
    res = nbdev('import nbdev.quarto as q; q._ensure_quarto = lambda: None; q.nbdev_proc_nbs()', tree)
    assert 'UserWarning' not in res.stderr, res.stderr
    assert_unchanged(before, contents(tree), 'nbdev-proc-nbs') # `nbs/nbdev.yml` is written by it
    pages = [f.relative_to(root/'nbs').as_posix() for f in notebooks]
    assert all((tree/'_proc'/f).exists() for f in pages)
    sidebar = (root/'nbs'/'sidebar.yml').read_text(encoding='utf-8')
    assert sorted(re.findall(r'- (\S+\.ipynb)', sidebar))==sorted(pages)

def test_outputs_show_the_page_and_not_the_machine():
    "Kept outputs have no warning of somebody's library, no path of somebody's machine and no progress bar"
    for nb in notebooks:
        for o in (o for c in cells(nb, 'code') for o in c['outputs']):
            assert o.get('name') != 'stderr', (nb.name, o)
            assert not re.search(r'site-packages|[ /]tmp/|/home/|█', ''.join(o.get('text', ''))), (nb.name, o)

def test_pieces_fit_a_screen():
    "As those of fastcore and fastxtend do"
    for nb in notebooks:
        for s in exported(nb): assert s.count('\n') < 50, (nb.name, s[:100])
        for s in (''.join(c['source']) for c in cells(nb, 'code')):
            for l in s.splitlines(): assert len(l) <= 130, (nb.name, l)

def test_front_page_says_what_readme_says():
    "But for where to read on"
    readme = (root/'README.md').read_text(encoding='utf-8').replace('](nbs/', '](')
    sections = re.split(r'^(?=## )', readme, flags=re.M)
    wanted = [s.strip() for s in sections if not s.startswith(('## Read on','## Run the tests'))]
    assert [''.join(c['source']).strip() for c in cells(root/'nbs'/'index.ipynb', 'markdown')][:-1]==wanted
