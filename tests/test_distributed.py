"Several processes that train one learner together: real ones, on gloo."
import math, os, pickle, socket, subprocess, sys, time
from pathlib import Path

import numpy as np, psutil, pytest, torch
from helpers import forks, loaders

pytest.importorskip('accelerate')

here = Path(__file__).parent
two_gpus = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')]
on_each_device = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=two_gpus)])

def by_torchrun(names, path, n, device, seconds):
    "As users start them; all of them are ended, whatever happens"
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), here/'processes.py', names, path]
    env = os.environ | dict(ACCELERATE_USE_CPU='true' if device=='cpu' else 'false', PYTHONPATH=os.pathsep.join([str(here.parent), str(here)]), OMP_NUM_THREADS='1', MPLBACKEND='Agg')
    proc = psutil.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try: out,_ = proc.communicate(timeout=seconds)
    except subprocess.TimeoutExpired: pytest.fail(f'{names} took more than {seconds} s')
    finally:
        if proc.is_running(): # torchrun gives each process a session of its own
            for o in [*proc.children(recursive=True), proc]: o.kill()
    assert proc.returncode==0, out[-5000:]

def by_fork(names, path, n, seconds):
    "Of a process that has imported everything already, which saves most of the time"
    import processes
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    procs,end = [forks.Process(target=processes.start, args=(i,n,port,names,path)) for i in range(n)],time.time()+seconds
    try:
        for o in procs: o.start()
        while any(o.exitcode is None for o in procs) and not any(o.exitcode for o in procs) and time.time() < end: time.sleep(.05)
        assert all(o.exitcode==0 for o in procs), '\n'.join(o.read_text()[-5000:] for o in sorted(path.glob('printed_*')))
    finally:
        for o in procs: o.kill()

def run(names, path, n=2, device='cpu', torchrun=False, seconds=240):
    "What each of `n` processes says. Of several names, a list of that for each"
    if torchrun or device!='cpu': by_torchrun(names, path, n, device, seconds)
    else: by_fork(names, path, n, seconds)
    res = [[pickle.loads((path/f'{o}_{i}.pkl').read_bytes()) for i in range(n)] for o in names.split(',')]
    return res if ',' in names else res[0]

@on_each_device
def test_what_they_find(tmp_path, device):
    "All processes have the same answer, and are as they were"
    res = run('answers,uneven,watching,company', tmp_path, device=device)
    for o,check in zip(res, (check_each_method, check_what_is_uneven, check_a_real_training, check_company)): check(*o)

def check_each_method(first, *others):
    assert all(o==first for o in others)
    for method,(stats,bs,as_before) in first.items():
        assert as_before and bs==64 and len(stats)==4, method
        assert all(0 < o < math.inf for o in stats[-1][:2]), method

@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_exact_value(tmp_path, n):
    "The interval of several processes covers it as that of one does"
    res,*others = run('exactness' if n==2 else 'exactness_of_four', tmp_path, n)
    assert all(o==res for o in others)
    noise,scale = res['exact']
    for kind in ('several','stepping','one'):
        means = np.mean(res[kind], 0)
        assert means[:2]==pytest.approx([noise,scale], rel=.1), kind
        covered = sum(low <= noise/scale <= high for *_,low,high in res[kind])
        assert covered >= .75*len(res[kind]), (kind, covered)

def check_what_is_uneven(first, *others):
    assert all(o==first for o in others)
    for name in ('short','sums'):
        found,right = first[name]
        assert found==pytest.approx(right, rel=.25), name
    assert first['accumulated']==(64,128) and first['lens']==(15,15) and first['new']==8 # 501 items each, one of them twice

@on_each_device
def test_the_recipe(tmp_path, device):
    "A profile, a race, suggestions; a training afterwards is bit for bit that without them"
    first,*others = run('recipe', tmp_path, device=device, torchrun=True)
    assert all(str(o)==str(first) for o in others) # nan==nan
    assert first['same'] and first['as_without']
    assert first['sizes'][0]==8 and first['sizes'][-1] <= 1437
    sugg = first['sugg']
    assert list(sugg)==['fastest','critical','lr','epochs','per_process'] and sugg['fastest']==2*sugg['per_process']
    assert any('in each of 2 processes' in o for o in first['how'])

def check_a_real_training(first, second):
    "The monitor changes nothing, and says the same in all processes; schedules go by the batch of all"
    for name in ('watched','timed'):
        assert all(str(o[name])==str(o['plain']) for o in (first,second)), name # losses and weights
        assert first[name+'_stats']==second[name+'_stats'] and first[name+'_stats'], name
    sizes = [o for _,o in first['history']]
    assert first['history']==second['history'] and set(sizes[:20])=={64} and max(sizes)==256

@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_fate(tmp_path, n):
    "What one process raises, all raise within seconds; they are as before and can go on"
    first,*others = run('faults' if n==2 else 'some_faults', tmp_path, n)
    for second in others:
        assert first['afterwards']==second.pop('afterwards') and first['afterwards']
    del first['afterwards']
    for name,(error,seconds,as_before) in first.items():
        assert error and as_before and seconds < 30, (name, error, seconds)
        assert ('KeyboardInterrupt' if name=='interrupt' else 'boom') in ' '.join(error), (name, error)
        assert all(o[name][0]==error and o[name][2] for o in others), (name, error, others)

def test_what_fails_in_all_processes(tmp_path):
    "Nothing is taken away: groups and models of the user's own stay in use"
    for forgotten,errors,same_group,total,grad,apart in run('common_faults', tmp_path):
        assert 'put this inside of `with learn.distrib_ctx():`' in forgotten
        for nm,expected in dict(event='boom', argument='lr must be positive').items():
            (_,said),seconds,as_before = errors[nm]
            assert expected in said and as_before and seconds < 30, nm
        assert same_group and total==2 and grad==[[1.,1.],[1.,1.]] # the mean of 0 and 2, in each row
        assert apart==('boom',[0,1],False) # not where only some have begun an exchange

def check_company(first, *others):
    "A communication hook, batch norm, bfloat16, worker processes, PyTorch's loaders"
    assert all(o==first for o in others)
    for name in ('hook','norm','bf16','workers','torch'):
        for method in ('accumulate','distributed'):
            found,as_before = first[name,method]
            assert found==pytest.approx(first[name], rel=.2) and as_before, (name, method)

def test_memory_and_nan_in_one_process(tmp_path):
    first,second = run('memory', tmp_path)
    assert first['full'][:2]==second['full'][:2]
    end,fitting,(error,seconds,as_before) = first['full']
    assert first['n_failed']==0 # each tries a size by itself: nobody has to be woken
    assert '256 did not fit' in end and fitting==[8,16,32,64,128]
    assert 'does not fit' in error[1] and error==second['full'][2][0] and as_before and seconds < 30
    (stats,said),(others,quiet) = first['nan'],second['nan']
    assert stats==others and len(stats)==4 and all(map(math.isfinite, stats[-1][:2])) # those before it
    assert any('became NaN' in o for o in said) and not quiet

def test_the_loader_can_be_sent_to_another_process():
    "As it is to processes that load its batches, where they are not forked"
    from fastai_bs_finder.distributed import shared_dl
    dl = shared_dl(loaders().train)
    again = pickle.loads(pickle.dumps(dl))
    assert type(again) is type(dl) and again.dl.bs==64
