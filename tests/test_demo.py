"The demo, on the digits and on a user's own files."
import re, subprocess, sys

import numpy as np, pandas as pd, pytest
from sklearn.datasets import load_breast_cancer
from fastai_bs_finder import demo

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    "Call the demo in a folder of its own; exit status, output and errors"
    monkeypatch.chdir(tmp_path)
    def _run(*args):
        code = 0
        try: demo.main([str(o) for o in args])
        except SystemExit as e: code = e.code
        return code,*capsys.readouterr()
    return _run

def test_digits(tmp_path):
    "The command prints the batch size and a table, and saves the picture where it says"
    command = [sys.executable, '-m', 'fastai_bs_finder.demo', '--num_it', '60']
    res = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    bs = int(re.search(r'Batch size: +(\d+)', res.stdout)[1])
    assert re.search(rf'^{bs} .* fastest\b', res.stdout, flags=re.M)
    assert [o.name for o in tmp_path.iterdir()]==[re.search(r'Picture: +(.+)', res.stdout)[1]]
    assert (tmp_path/'bs_find.png').read_bytes().startswith(b'\x89PNG')
    assert not res.stderr or 'step times scatter' in res.stderr # other tests run beside it

@pytest.mark.filterwarnings('error', 'ignore:the step times scatter', 'ignore:The noise scale may be far off', 'ignore:fastest is')
@pytest.mark.parametrize('header', [True,False])
def test_own_table(tmp_path, run, header):
    "A CSV with and without a header line"
    load_breast_cancer(as_frame=True).frame.to_csv(tmp_path/'cancer.csv', index=False, header=header)
    code,out,err = run('--data', 'cancer.csv', '--target', 'target' if header else '30', '--out', 'own.png', '--num_it', 40)
    assert code==0, err
    assert 'Batch size:' in out and (tmp_path/'own.png').exists()

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
def test_errors(tmp_path, run, args, words):
    "Bad paths and columns end with a sentence, and not with a traceback"
    (tmp_path/'t.csv').write_text('a,b\n1,2\n3,4\n')
    (tmp_path/'bare.csv').write_text('1,2\n3,4\n')
    pd.DataFrame(dict(a=range(200))).to_csv(tmp_path/'only.csv', index=False)
    pd.DataFrame(dict(a=range(200), name=[f'n{i}' for i in range(200)])).to_csv(tmp_path/'ids.csv', index=False)
    pd.DataFrame(dict(a=range(200), b=1)).to_csv(tmp_path/'headed.csv', index=False)
    np.savez(tmp_path/'few.npz', x_train=np.random.rand(50,8,8), y_train=np.arange(50)%2)
    np.savez(tmp_path/'flat.npz', x_train=np.ones((200,8,8)), y_train=np.arange(200)%2)
    for f in ('t.txt','bad.npz','empty.csv'): (tmp_path/f).write_text('')
    code,out,err = run(*args)
    assert code==2 and words in err.replace('\n',' '), err
