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
    command = [sys.executable, '-m', 'fastai_bs_finder.demo', '--seconds', '6']
    res = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    bs = int(re.search(r'Batch size: +(\d+)', res.stdout)[1])
    assert re.search(rf'^{bs} .* fastest\b', res.stdout, flags=re.M)
    assert [o.name for o in tmp_path.iterdir()]==[re.search(r'Picture: +(.+)', res.stdout)[1]]
    assert (tmp_path/'bs_find.png').read_bytes().startswith(b'\x89PNG')
    warnings = re.findall(r'UserWarning: (.+)', res.stderr)
    hurried = ('step times scatter', 'the machine was', 'largest batch size that was tried', 'The noise scale may be far off',
               'other programs keep the processor busy')
    assert all(any(h in o for h in hurried) for o in warnings) and bool(warnings)==bool(res.stderr) # other tests run beside it

@pytest.mark.filterwarnings('error::UserWarning', 'ignore::DeprecationWarning', 'ignore:the step times scatter',
                            'ignore:The noise scale may be far off', 'ignore:fastest is', 'ignore:critical would be', 'ignore:the machine was',
                            'ignore:A window of', 'ignore:The gradient drowned') # on a slow machine six seconds are not enough
@pytest.mark.parametrize('header', [True,False])
def test_own_table(tmp_path, run, header):
    "A CSV with and without a header line"
    load_breast_cancer(as_frame=True).frame.to_csv(tmp_path/'cancer.csv', index=False, header=header)
    code,out,err = run('--data', 'cancer.csv', '--target', 'target' if header else '30', '--out', 'own.png', '--seconds', 6)
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
    (['--data','thin.npz'], 'expected images of shape'),
    (['--data','flat.npz'], 'images that differ'),
    (['--data','nan.npz'], 'x_train has 64 values that are NaN, of 12,800'),
    (['--data','inf.npz'], 'x_train has 1 values that are infinite or beyond ±1e+15, of 12,800'),
    (['--data','huge.npz'], 'x_train has 12,800 values that are infinite or beyond'),
    (['--data','words.npz'], 'x_train should have numbers, it has <U1'),
    (['--data','objects.npz'], "can't be read as a NumPy archive"),
    (['--data','cut.npz'], "can't be read as a NumPy archive"),
    (['--data','flipped.npz'], "can't be read as a NumPy archive"),
    (['--data','one.npz'], "can't be read as a NumPy archive"),
    (['--data','other.npz'], "should have the arrays x_train and y_train, it has 'a', 'y_train'"),
    (['--data','unknown.npz'], 'y_train has 1 values that are NaN'),
    (['--data','real.npz'], 'y_train has 200 different values for 200 images'),
    (['--data','hollow.csv','--target','b'], "nothing stands in 'a'"),
    (['--data','inf.csv','--target','b'], "column 'a' has 1 values that are infinite"),
    (['--data','huge.csv','--target','b'], "column 'b' has 199 values that are infinite or beyond"),
    (['--out','folder.png'], "can't be saved as folder.png: Is a directory"),
    (['--target','a'], '--target names a column of a .csv table'),
    (['--data','headed.csv','--target','1'], "has a header line ('a' stands above numbers)"),
    (['--data','.'], 'is a folder'),
    (['--out','x.foo'], "can't be saved as x.foo"),
    (['--seconds','0'], 'seconds must be a positive, finite number, got 0'),
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
    bad_archives(tmp_path)
    x = np.linspace(0, 1, 200)
    pd.DataFrame(dict(a=np.nan, b=x)).to_csv(tmp_path/'hollow.csv', index=False)
    pd.DataFrame(dict(a=np.where(x==1, np.inf, x), b=x)).to_csv(tmp_path/'inf.csv', index=False)
    pd.DataFrame(dict(a=x, b=1e300*x)).to_csv(tmp_path/'huge.csv', index=False)
    (tmp_path/'folder.png').mkdir()
    before = set(tmp_path.iterdir())
    code,out,err = run(*args)
    assert code==2 and words in err.replace('\n',' ') and err.count('\n')==1, err
    assert set(tmp_path.iterdir())==before

def bad_archives(path):
    "Archives that one can't train with"
    x,y = np.random.rand(200,8,8),np.arange(200)%2
    def save(name, x=x, y=y, **kwargs): np.savez(path/f'{name}.npz', x_train=x, y_train=y, **kwargs)
    save('nan', x=np.where(np.arange(200)[:,None,None]==3, np.nan, x))
    save('inf', x=np.where(x==x.max(), np.inf, x))
    save('huge', x=1e300*(1+x))
    np.savez(path/'thin.npz', x_train=np.zeros((200,0,8)), y_train=y)
    save('words', x=np.where(x<.5, 'a', 'b'))
    save('objects', x=x.astype(object))
    save('unknown', y=np.where(np.arange(200)==3, np.nan, y))
    save('real', y=np.linspace(0, 1, 200))
    np.savez(path/'other.npz', a=x, y_train=y)
    content = (path/'words.npz').read_bytes()
    (path/'cut.npz').write_bytes(content[:len(content)//2])
    (path/'flipped.npz').write_bytes(content[:2000]+bytes(200)+content[2200:])
    with open(path/'one.npz', 'wb') as f: np.save(f, x)

@pytest.mark.parametrize('name,values', [('images',0), ('images',1e-30), ('table',1e14)])
def test_strange_but_possible(tmp_path, run, name, values):
    "Data that one can train with, if to no end: a result, or one line that says why there is none"
    rng = np.random.default_rng(0)
    x,dots = rng.random((200,8,8)),rng.random((200,8,8)) > .99
    np.savez(tmp_path/'images.npz', x_train=values*x+dots, y_train=np.arange(200)%2)
    pd.DataFrame(dict(a=rng.random(200), b=values*rng.random(200))).to_csv(tmp_path/'table.csv', index=False)
    data = ['images.npz'] if name=='images' else ['table.csv','--target','b']
    code,out,err = run('--seconds', 4, '--data', *data)
    assert 'Traceback' not in err and ('Found:' in out or len(err.strip().splitlines())==1 or code==2), (out,err)

def start(tmp_path, *args, **kwargs):
    command = [sys.executable, '-u', '-m', 'fastai_bs_finder.demo', '--seconds', '3', *args]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)

def test_closed_output(tmp_path):
    "`| head -1` is no error, and the picture is there"
    p = start(tmp_path)
    p.stdout.readline(), p.stdout.close()
    err = p.stderr.read()
    assert p.wait()==0 and 'Error' not in err, err
    assert (tmp_path/'bs_find.png').exists()

def test_interrupt(tmp_path):
    "Ctrl-C ends it with one line"
    code = """import threading,os,signal
from fastai_bs_finder import demo
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell may start what runs in the background without
threading.Timer(2, os.kill, (os.getpid(),signal.SIGINT)).start()
demo.main(['--seconds','1000'])"""
    p = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==130 and p.stderr.strip().splitlines()[-1]=='interrupted' and 'Traceback' not in p.stderr, p.stderr
