"README's promises: its code runs, its commands are the ones that CI runs, and it stays short."
import re, runpy
from pathlib import Path

import pytest
from sklearn.datasets import load_breast_cancer
from fastai.data.block import CategoryBlock
from fastai.data.transforms import Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.torch_core import set_seed

root = Path(__file__).resolve().parents[1]
readme = (root/'README.md').read_text(encoding='utf-8')
blocks = re.findall(r'```python\n(.*?)```', readme, flags=re.S)
command = runpy.run_path(root/'.ci'/'readme_command.py')['command']

@pytest.fixture
def dls():
    "The `dls` of README's code: a table with a column to predict"
    set_seed(0)
    df = load_breast_cancer(as_frame=True).frame
    columns = dict(cont_names=list(df.columns[:-1]), y_names='target', y_block=CategoryBlock())
    return TabularDataLoaders.from_df(df, procs=[Normalize], bs=16, device='cpu', **columns)

@pytest.mark.filterwarnings('ignore')
def test_code_blocks(dls, tmp_path, monkeypatch):
    "All python blocks of README run one after the other, and what they say comes out is there"
    monkeypatch.chdir(tmp_path) # where `lr_find` keeps the weights meanwhile
    assert len(blocks) >= 2
    names = {'dls': dls}
    for b in blocks: exec(b, names)
    sugg,learn = names['sugg'],names['learn']
    assert sugg._fields==('fastest','critical','lr','epochs') and learn.dls.train.bs==sugg.fastest
    assert len(learn.recorder.values)==sugg.epochs
    assert learn.recorder.noise_scale and learn.recorder.profile.largest_fit

def test_commands():
    "One that shows what the package does, and one that runs all tests, pytest last: CI takes it from here"
    assert command('try').strip()=='pip install . && python -m fastai_bs_finder.demo'
    assert re.fullmatch(r"pip install -e '\.\[dev\]' && nbdev-test && pytest", command('test').strip())

def test_pictures_and_links_exist():
    "Files that README shows or links to are in the repository"
    paths = [o for o in re.findall(r'\]\(([^)]+)\)', readme) if not o.startswith('http')]
    assert any(o.endswith('.png') for o in paths)
    for o in paths: assert (root/o).exists(), o

def test_is_short(): assert len(readme.encode()) <= 7000
