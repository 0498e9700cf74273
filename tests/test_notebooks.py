"The notebooks are the source: the modules are what they export, and they are clean."
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]

@pytest.fixture
def tree(tmp_path):
    "A copy of what nbdev reads and writes"
    for d in ('nbs','fastai_bs_finder'): shutil.copytree(root/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints'))
    for f in ('settings.ini','pyproject.toml','README.md'): shutil.copy(root/f, tmp_path)
    return tmp_path

def contents(path): return {f.relative_to(path).as_posix(): f.read_bytes() for d in ('nbs','fastai_bs_finder') for f in sorted((path/d).rglob('*')) if f.is_file()}

@pytest.mark.parametrize('command', ['export','clean'])
def test_nothing_left_to_do(tree, command):
    before = contents(tree)
    assert len([f for f in before if f.endswith('.ipynb')]) >= 5
    subprocess.run([sys.executable, '-c', f'from nbdev.{"cli" if command=="export" else "clean"} import nbdev_{command}; nbdev_{command}()'], cwd=tree, check=True)
    after = contents(tree)
    changed = sorted(f for f in before|after if before.get(f) != after.get(f))
    assert not changed, f"run nbdev-{command} and commit: {changed}"

def test_outputs_show_the_page_and_not_the_machine():
    "Kept outputs have no warning of somebody's library, no path of somebody's machine and no progress bar"
    for nb in (root/'nbs').rglob('*.ipynb'):
        for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
            for o in c.get('outputs', []):
                assert o.get('name') != 'stderr', (nb.name, o)
                assert not re.search(r'site-packages|[ /]tmp/|/home/|█', ''.join(o.get('text', ''))), (nb.name, o)
