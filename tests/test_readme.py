"README's promises: its code runs, its commands are the ones that CI runs, its first command says what it found."
import re, runpy, subprocess, sys
from pathlib import Path
import pytest
from conftest import *

root = Path(__file__).resolve().parents[1]
readme = (root/'README.md').read_text(encoding='utf-8')
blocks = re.findall(r'```python\n(.*?)```', readme, flags=re.S)
command = runpy.run_path(root/'.ci'/'readme_command.py')['command']

@pytest.fixture
def dls():
    "The `dls` of README's code: a table with a column to predict"
    from fastai.tabular.all import TabularDataLoaders, Normalize, CategoryBlock
    from sklearn.datasets import load_breast_cancer
    set_seed(0)
    df = load_breast_cancer(as_frame=True).frame
    return TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=list(df.columns[:-1]), y_names='target', y_block=CategoryBlock(), bs=16, device='cpu')

def test_code_blocks(dls, tmp_path, monkeypatch):
    "All python blocks of README run one after the other, and what they say comes out is there"
    monkeypatch.chdir(tmp_path) # where `lr_find` keeps the weights meanwhile
    assert len(blocks) >= 2
    names = {'dls': dls}
    for b in blocks: exec(b, names)
    sugg,learn = names['sugg'],names['learn']
    assert sugg._fields==('fastest','critical') and learn.dls.train.bs==sugg.fastest and len(learn.recorder.values)==1
    assert learn.recorder.noise_scale and learn.recorder.profile.largest_fit
    assert len(blocks[0].strip().splitlines()) <= 5

def test_first_command_is_the_demo():
    "README's first command installs and runs the demo, and nothing more"
    assert command('try').strip() == 'pip install . && python -m fastai_bs_finder.demo'

def test_test_command_runs_all_tests():
    "README's second command installs with [dev] and runs notebooks and pytest, pytest last; CI takes it from README"
    assert command('test').strip() == "pip install -e '.[dev]' && nbdev-test && pytest"
    assert '.ci/readme_command.py test' in (root/'.ci'/'run').read_text()

def test_no_placeholder():
    "Every figure was filled in"
    assert not re.search(r'\b[A-Z]{4,}\d+\b|TODO|DEMO_OUTPUT|FIGURES', readme)

def test_pictures_and_links_exist():
    "Files that README shows or links to are in the repository"
    paths = [o for o in re.findall(r'\]\(([^)]+)\)', readme) if not o.startswith('http')]
    assert any(o.endswith('.png') for o in paths)
    for o in paths: assert (root/o).exists(), o

def demo(*args, cwd): return subprocess.run([sys.executable, '-m', 'fastai_bs_finder.demo', *map(str,args)], cwd=cwd, capture_output=True, text=True)

def test_demo_on_digits(tmp_path):
    "The demo prints the batch size and a table, and saves the picture where it says"
    res = demo(cwd=tmp_path)
    assert res.returncode==0, res.stderr
    bs = int(re.search(r'Batch size: +(\d+)', res.stdout)[1])
    assert re.search(rf'^{bs} .* fastest\b', res.stdout, flags=re.M)
    assert [o.name for o in tmp_path.iterdir()]==[re.search(r'Picture: +(.+)', res.stdout)[1]]
    assert (tmp_path/'bs_find.png').read_bytes().startswith(b'\x89PNG')
    assert not res.stderr or 'step times scatter' in res.stderr # other tests run beside it

def test_demo_on_own_table(tmp_path):
    "A CSV with and without a header line"
    from sklearn.datasets import load_breast_cancer
    df = load_breast_cancer(as_frame=True).frame
    df.to_csv(tmp_path/'cancer.csv', index=False)
    df.to_csv(tmp_path/'bare.csv', index=False, header=False)
    for args in (['cancer.csv','--target','target'], ['bare.csv','--target','30']):
        res = demo('--data', *args, '--out', 'own.png', cwd=tmp_path)
        assert res.returncode==0, res.stderr
        assert 'Batch size:' in res.stdout and (tmp_path/'own.png').exists()
        assert not res.stderr or re.search('noise scale may be far off|step times scatter', res.stderr) # with 455 rows, and other tests beside it

@pytest.mark.parametrize('args,words', [
    (['--data','nowhere.csv'], 'there is no file nowhere.csv'),
    (['--data','t.csv'], 'say which column to predict with --target'),
    (['--data','t.csv','--target','z'], "no column 'z', it has 'a', 'b'"),
    (['--data','bare.csv','--target','7'], 'there is no column 7'),
    (['--data','t.csv','--target','b'], 'at least 100 rows'),
    (['--data','t.txt'], 'should be a .csv table or a .npz archive'),
    (['--data','empty.csv','--target','a'], "can't be read as a CSV file"),
    (['--data','bad.npz'], "can't be read as a NumPy archive"),
    (['--data','only.csv','--target','a'], "no column but 'a'"),
    (['--data','ids.csv','--target','name'], '200 different values'),
    (['--data','few.npz'], 'at least 100 images'),
    (['--data','flat.npz'], 'images that differ'),
    (['--target','a'], '--target names a column of a .csv table'),
    (['--data','headed.csv','--target','1'], "has a header line ('a' stands above numbers)"),
    (['--data','.'], 'is a folder'),
    (['--out','x.foo'], "can't be saved as x.foo"),
    (['--num_it','9'], '--num_it must be at least 10'),
    (['--out','nowhere/x.png'], 'there is no folder nowhere'),
])
def test_demo_errors(tmp_path, args, words):
    "Bad paths and columns end with a sentence, not with a traceback"
    (tmp_path/'t.csv').write_text('a,b\n1,2\n3,4\n')
    (tmp_path/'bare.csv').write_text('1,2\n3,4\n')
    pd.DataFrame(dict(a=range(200))).to_csv(tmp_path/'only.csv', index=False)
    pd.DataFrame(dict(a=range(200), name=[f'n{i}' for i in range(200)])).to_csv(tmp_path/'ids.csv', index=False)
    pd.DataFrame(dict(a=range(200), b=1)).to_csv(tmp_path/'headed.csv', index=False)
    np.savez(tmp_path/'few.npz', x_train=np.random.rand(50,8,8), y_train=np.arange(50)%2)
    np.savez(tmp_path/'flat.npz', x_train=np.ones((200,8,8)), y_train=np.arange(200)%2)
    for f in ('t.txt','bad.npz','empty.csv'): (tmp_path/f).write_text('')
    res = demo(*args, cwd=tmp_path)
    assert res.returncode==2 and words in res.stderr.replace('\n',' '), res.stderr
    assert 'Traceback' not in res.stderr
