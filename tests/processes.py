"""What several processes do in tests/test_distributed.py: functions, and what they say is kept.

`torchrun ... processes.py NAMES FOLDER` calls them, and so does `start` in a process that the test has made by itself."""
import math, multiprocessing, os, pickle, random, sys, time, warnings
from pathlib import Path

warnings.filterwarnings('ignore', module=r'(torch|fastai|accelerate)\.')

import numpy as np, torch, torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader as TorchDL, TensorDataset
from fastai.callback.core import Callback
from fastai.callback.fp16 import *
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.distributed import *
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastai_bs_finder.all import *
from fastai_bs_finder import distributed
from helpers import digits, loaders, make_learner, plain_learner, same, search, weights
from measuring import exact, learner, net

torch.set_num_threads(1)

def distrib(learn): return learn.distrib_ctx(sync_bn=False)

def share(learn):
    "Loaders for a real training, as they are needed where there is no GPU"
    if os.environ['ACCELERATE_USE_CPU']=='true': learn.dls = learn.dls.shared()

def state(learn):
    "All that has to be as it was; of the loaders, what they hand out next"
    opt = learn.opt.state_dict() if learn.opt else None
    chance = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    return weights(learn),opt,chance,learn.dls.train.rng.getstate(),[o.name for o in learn.cbs],type(learn.model).__name__

# --- what they find

def answers():
    "Searches by each method, and what they leave behind"
    res = {}
    for method in ('auto','accumulate','split','per_example','sequential','l1','distributed'):
        learn = plain_learner(bs=32)
        with distrib(learn):
            before = state(learn)
            search(learn, method=method, num_it=20, n_batch=5, lr=1e-3)
            as_before = same(before, state(learn))
        res[method] = learn.recorder.bs_find_stats.values.tolist(),learn.recorder.search.bs,as_before
    return res

def still(learn, method, **kwargs):
    "Noise, scale, their ratio and its interval, at weights that stand still"
    learn.bs_find(1e-12, **dict(beta=1, show_plot=False, suggest_funcs=None, method=method, num_it=80, n_batch=8) | kwargs)
    return learn.recorder.bs_find_stats.iloc[-1].tolist()

def exactness(n_seeds=6):
    "The interval of several processes, and of one with as many examples, beside the exact value"
    def make(seed):
        learn = learner(bs=4)
        learn.dls.train.rng.seed(seed)
        return learn
    res,(noise,scale) = dict(exact=None, several=[], stepping=[], one=[]),exact(learner(bs=4))
    res['exact'] = noise,scale
    for seed in range(n_seeds):
        learn = make(seed)
        with distrib(learn):
            res['several'].append(still(learn, 'accumulate'))
            res['stepping'].append(still(learn, 'distributed'))
    share = [still(make(seed), 'accumulate', n_batch=8*n_procs, num_it=80*n_procs) for seed in range(rank, n_seeds, n_procs)]
    dist.all_gather_object(shares := [None]*n_procs, share)
    return res | dict(one=sum(shares, []))

def exactness_of_four(): return exactness(3)

def uneven():
    "Last batches that are shorter, and a dataset that does not divide; a loss that adds up; accumulation"
    res,total = {},CrossEntropyLossFlat(reduction='sum')
    for name,kwargs in dict(short=dict(bs=7, drop_last=False), sums=dict(bs=8, loss=total)).items():
        learn = learner(**kwargs)
        with distrib(learn): res[name] = still(learn, 'accumulate', num_it=160)[:2],exact(learner(**kwargs))
    learn = plain_learner(bs=32, n=1001)
    learn.add_cb(GradientAccumulation(64))
    with distrib(learn):
        sugg = search(learn)
        learn.dls = learn.dls.shared()
        lens = len(learn.dls.train),sum(1 for _ in learn.dls.train)
    return res | dict(sugg=tuple(sugg), accumulated=(learn.recorder.search.micro_bs, learn.recorder.search.train_bs), lens=lens,
                      new=learn.dls.train.new(bs=8).bs)

class Count(Callback):
    "The batches that a process trains on"
    run_mock,run_valid = False,False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append(self.xb[0].sum().item())

def trained(searched):
    "Losses and batches of a training, after a search or not"
    learn = make_learner(bs=32)
    share(learn)
    with distrib(learn):
        if searched: learn.bs_find(1e-2, num_it=20, show_plot=False)
        set_seed(3)
        with learn.no_logging(): learn.fit(1, 1e-2, cbs=Count())
    return [o.item() for o in learn.recorder.losses],weights(learn)

def recipe():
    "Profile, race and the whole recipe; a training is the same with and without it"
    learn = plain_learner(bs=32)
    with distrib(learn):
        before = state(learn)
        stats = learn.bs_profile(limit=5, show_plot=False)
        race = learn.lr_race(seconds=2, show_plot=False)
        sugg = learn.bs_find(seconds=6, epochs=2, show_plot=False)
        table,as_before = learn.recorder.bs_table(),same(before, state(learn))
    with_it,without = trained(True),trained(False)
    return dict(profile=stats.values.tolist(), sizes=list(stats.index), race=tuple(race), sugg=sugg._asdict(), how=list(table.how),
                table=table.drop(columns='how').values.tolist(), same=as_before, as_without=same(with_it, without))

def watching():
    "A monitor beside a training, and a batch that grows"
    res = {}
    for name,cbs in dict(plain=[], watched=[NoiseScaleMonitor(every=1)], timed=[NoiseScaleMonitor()]).items():
        learn = make_learner(bs=32)
        share(learn)
        set_seed(1)
        with distrib(learn), learn.no_logging(): learn.fit(2, 1e-2, cbs=cbs)
        res[name] = [o.item() for o in learn.recorder.losses],weights(learn)
        if cbs: res[name+'_stats'] = learn.recorder.bs_find_stats.values.tolist()
    learn = plain_learner(bs=32)
    share(learn)
    with distrib(learn), learn.no_logging(): learn.fit(2, 1e-2, cbs=[cb := BatchSizeSchedule({0: 64, 1: 256}, max_bs=128)])
    return res | dict(history=cb.history)

class Compress(Callback):
    "A communication hook of the user's"
    run_mock,order = True,12 # after the model is wrapped
    def before_fit(self):
        if isinstance(self.model, DistributedDataParallel): self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)

def normed(): return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16,10))

def with_worker(learn):
    learn.dls.loaders = [o.new(num_workers=1) for o in learn.dls.loaders]
    return learn

def torch_learner():
    set_seed(0)
    x,y = (torch.stack(o) for o in zip(*digits()))
    dls = DataLoaders(*(TorchDL(TensorDataset(x[i:j], y[i:j]), batch_size=4, shuffle=i==0) for i,j in ((0,128),(128,256))))
    return Learner(dls, net(), CrossEntropyLossFlat(), opt_func=Adam).remove_cb(ProgressCallback)

def company():
    "What people have beside it: noise and scale, those of a search without, and whether all is as before"
    makes = dict(
        hook=lambda: learner(bs=4, cbs=Compress()), norm=lambda: learner(normed), bf16=lambda: learner(bs=4).to_bf16(),
        workers=lambda: with_worker(learner(bs=4)), torch=torch_learner)
    res = {}
    for name,make in makes.items():
        learn = make()
        with distrib(learn):
            before = weights(learn)
            for method in ('accumulate','distributed'): res[name,method] = still(learn, method, num_it=160)[:2],same(before, weights(learn))
        learn = make()
        res[name] = still(learn, 'accumulate', num_it=320)[:2]
    return res

# --- what goes wrong

class Fails(Callback):
    "Fails at an event, in one process"
    run_mock,run_valid,order = True,False,50
    def __init__(self, event, error, only=(1,)): self.event,self.error,self.only,self.n = event,error,only,0
    def __getattr__(self, k):
        if k==self.__dict__.get('event'): return self.fail
        raise AttributeError(k)
    def fail(self):
        self.n += 1
        once = self.event.endswith(('_fit','_epoch','_train'))
        if rank in self.only and self.n==(1 if once else 3): raise self.error

def failing(cb, call=None):
    "What each process raises, how long it took, and whether all is as before"
    learn = plain_learner(bs=32)
    learn.add_cbs([cb] if cb else [])
    with distrib(learn):
        before,start,error = state(learn),time.perf_counter(),None
        try: (call or (lambda learn: search(learn)))(learn)
        except BaseException as e: error = e
        if error is not None: error = type(error).__name__,' '.join(str(error).split())
        return error,time.perf_counter()-start,same(before, state(learn))

events = 'before_fit before_train before_batch after_loss after_backward before_step after_batch after_cancel_fit after_fit'.split()

def some_faults(events=('before_batch','after_backward')):
    "One process fails at each event; afterwards all can go on"
    distributed._soon = .1
    res = {e: failing(Fails(e, ValueError(f'boom in {e}'))) for e in events}
    res['apart'] = failing(Fails(('after_loss','before_batch')[rank%2], ValueError('boom'), only=range(n_procs)))
    learn = plain_learner(bs=32)
    with distrib(learn): search(learn)
    return res | dict(afterwards=learn.recorder.bs_find_stats.values.tolist())

def faults():
    "Likewise, and in a profile and a race"
    res = some_faults(events)
    res['interrupt'] = failing(Fails('before_step', KeyboardInterrupt()))
    res['first'] = failing(Fails('after_pred', ZeroDivisionError('boom'), only=(0,)), lambda learn: learn.bs_find(show_plot=False, seconds=5))
    def profile(learn):
        learn.bs_profile(limit=20, show_plot=False)
        raise RuntimeError(learn.recorder.profile_end) # what was timed before is kept
    def race(learn): learn.lr_race(seconds=5, show_plot=False)
    for e in ('before_fit','after_batch'):
        for call in (profile,race): res[f'{call.__name__}, {e}'] = failing(Fails(e, ValueError(f'boom in {e}')), call)
    learn = plain_learner(bs=32)
    with distrib(learn): search(learn)
    return res | dict(afterwards=learn.recorder.bs_find_stats.values.tolist())

def common_faults():
    "All processes fail at once: nothing of the user's that belongs to the process group is taken away"
    learn = plain_learner(bs=32)
    learn.dls = learn.dls.shared()
    try: search(learn)
    except RuntimeError as e: forgotten = str(e)
    failing(None) # which connects the processes
    group,mine,ddp = dist.group.WORLD,dist.new_group(),DistributedDataParallel(nn.Linear(2,2))
    res = dict(event=failing(Fails('after_loss', ValueError('boom'), only=range(n_procs))), argument=failing(None, lambda learn: learn.bs_find(-1.)))
    ddp(torch.ones(2,2)*rank).sum().backward()
    dist.all_reduce(t := torch.ones(1), group=mine)
    same_group = dist.group.WORLD is group
    try:
        with distributed.Group().one_fate(): # all fail, but some have begun an exchange
            if rank: dist.all_reduce(torch.ones(1), async_op=True)
            raise ValueError('boom')
    except ValueError as e: boom = str(e)
    after = distributed.Group().gather(torch.tensor([rank])).flatten().tolist()
    return forgotten, res, same_group, t.item(), ddp.module.weight.grad.tolist(), (boom, after, dist.group.WORLD is group)

class Full(Callback):
    "One process has no memory for more than `most` items"
    run_mock,run_valid = True,False
    def __init__(self, most): self.most = most
    def after_pred(self):
        if rank==1 and len(self.yb[0]) > self.most: raise torch.cuda.OutOfMemoryError('CUDA out of memory')

class Nan(Callback):
    "The loss of one process is NaN, once"
    run_mock,run_valid,order = True,False,-5
    def before_fit(self): self.n = 0
    def after_loss(self):
        self.n += 1
        if rank==1 and self.n==23: self.learn.loss_grad = self.learn.loss_grad*math.nan

def memory():
    "A size that does not fit in one process; NaN in one process"
    learn = plain_learner(bs=32)
    learn.add_cb(Full(100))
    with distrib(learn): stats,n_failed = learn.bs_profile(limit=20, show_plot=False),distributed._failures
    full = learn.recorder.profile_end,list(stats.index[stats.fits]),failing(Full(100), lambda l: search(l, bs=512))
    learn = plain_learner(bs=32)
    learn.add_cb(Nan())
    with distrib(learn):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            search(learn, num_it=40, n_batch=5)
    return dict(full=full, n_failed=n_failed, nan=(learn.recorder.bs_find_stats.values.tolist(), [str(o.message) for o in said]))

def work(names, folder):
    "Call each function, and keep what it says"
    global rank,n_procs
    rank,n_procs = int(os.environ['RANK']),int(os.environ['WORLD_SIZE'])
    if hasattr(os, 'nice'): os.nice(10) # tests that run beside these have their seconds counted
    for name in names.split(','): (folder/f'{name}_{rank}.pkl').write_bytes(pickle.dumps(globals()[name]()))
    dist.barrier() # the first has the store, which others may still ask
    dist.destroy_process_group()

def start(i, n, port, names, folder):
    "What torchrun does for a process: tell it which one it is, and keep what it prints"
    os.environ.update(ACCELERATE_USE_CPU='true', RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    multiprocessing.set_start_method('fork', force=True) # of loaders: a dataset of a thousand tensors can't be sent
    with open(folder/f'printed_{i}.txt', 'w') as f:
        for o in (1,2): os.dup2(f.fileno(), o)
    work(names, folder)

if __name__=='__main__': work(sys.argv[1], Path(sys.argv[2]))
