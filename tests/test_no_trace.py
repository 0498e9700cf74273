"Whatever happens in `bs_find`, the learner, the random states and the disk are afterwards as they were before."
import gc, math, operator, os, random, signal, subprocess, sys, tempfile, threading
from array import array
from collections import Counter, deque
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import ItemTransform
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.block import CategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.text.data import LMDataLoader
from fastai.torch_core import params, set_seed
from fastcore.basics import noop
from fastcore.foundation import L
from torch import nn, Tensor, tensor
from fastai_bs_finder.all import BSFinder, preserve
from fastai_bs_finder.recorder import BSRecorder
from helpers import disk, limited, make_learner, same, search, weights

class Same:
    "Equal to itself only; keeps the object alive, so that its id is not given away"
    def __init__(self, o): self.o = o
    def __eq__(self, other): return isinstance(other, Same) and self.o is other.o
    def __repr__(self): return f'<{type(self.o).__name__} {id(self.o):x}>'

_measured = 'search','profile','race'

_leaves = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, str, bytes, int, float, complex, bool, type(None),
           Path, torch.device, torch.dtype)

def walk(v, path, res):
    "Put all that is reachable from `v` in `res`: contents by value, objects by identity too"
    if isinstance(v, _leaves): res[path] = repr(v) if isinstance(v, float) else v; return
    if id(v) in res['seen']: res[path] = Same(v); return
    res['seen'][id(v)],res[path] = v,Same(v)
    if isinstance(v, Tensor):
        res[path+'.tensor'] = (v.dtype, v.device, v.shape, v.stride(), v.requires_grad, v.data_ptr(), bool(v._backward_hooks),
                               v.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if v.is_leaf: walk(v.grad, path+'.grad', res)
    elif isinstance(v, np.ndarray): res[path+'.array'] = v.dtype,v.shape,v.tobytes()
    elif isinstance(v, random.Random): res[path+'.rng'] = v.getstate()
    elif isinstance(v, torch.Generator): res[path+'.rng'] = v.get_state().numpy().tobytes()
    elif isinstance(v, dict):
        res[path+'.keys'] = [k if isinstance(k, _leaves) else Same(k) for k in v]
        for i,(k,o) in enumerate(v.items()): walk(o, f'{path}[{k if isinstance(k, (str,int)) else i}]', res)
    elif isinstance(v, np.random.RandomState): res[path+'.rng'] = repr(v.get_state(legacy=False))
    elif isinstance(v, (list,tuple,L,deque)):
        res[path+'.len'] = len(v)
        for i,o in enumerate(v): walk(o, f'{path}[{i}]', res)
    elif isinstance(v, (set,frozenset)): res[path+'.set'] = frozenset(v)
    elif hasattr(v, '__dict__'):
        d = {k: o for k,o in object.__getattribute__(v, '__dict__').items() if not (isinstance(v, Recorder) and k in _measured)}
        res[path+'.keys'] = list(d)
        for k,o in d.items(): walk(o, f'{path}.{k}', res)

def snapshot(learn, *more):
    "All of `learn` (and of `more`), the random states and the disk; not what `bs_find` is there to leave in the recorder"
    res = dict(seen={})
    walk(learn, 'learn', res)
    for i,o in enumerate(more): walk(o, f'more{i}', res)
    res.update(
        py=random.getstate(), np=repr(np.random.get_state(legacy=False)), torch=torch.get_rng_state().numpy().tobytes(),
        grad=torch.is_grad_enabled(), autocast=torch.is_autocast_enabled('cpu'), disk=disk(learn.path), cwd=os.getcwd())
    return res

def changes(before, after):
    return sorted(k for k in before|after if k != 'seen' and (k not in before or k not in after or before[k] != after[k]))

def assert_untouched(learn, before, *more): assert not (c := changes(before, snapshot(learn, *more))), c

class Noise(ItemTransform):
    "Augment with all the random generators, in the workers too"
    def encodes(self, o): return o[0] + .01*(torch.randn(1,8,8) + random.random() + np.random.rand()), o[1]

class Losses(Callback):
    "The loss of every batch of training and validation, unsmoothed"
    def before_fit(self): self.all = []
    def after_batch(self): self.all.append(self.learn.loss.detach().clone())

opts = dict(sgd=partial(SGD, mom=.9), adam=Adam, adamw=partial(OptimWrapper, opt=torch.optim.AdamW))

tmp = tempfile.TemporaryDirectory()

def fresh(opt='adam', workers=0, path=None, **kwargs):
    "A learner with 22 small batches an epoch, of augmented items"
    path = path or tempfile.mkdtemp(dir=tmp.name)
    learn = make_learner(path, opt_func=opts[opt], **kwargs)
    ds = learn.dls.train.dataset
    learn.dls = DataLoaders.from_dsets(
        ds[:360], ds[360:424], bs=16, num_workers=workers, shuffle=True, drop_last=True, device='cpu', path=path,
        after_item=[Noise()])
    return learn

def halves(m): return [params(m[:2]), params(m[2:])]

def find_lr(learn): return learn.lr_find(num_it=20, show_plot=False)

def train(learn, n=1):
    "Train and return all that came of it"
    losses = Losses()
    with learn.no_logging(): learn.fit_one_cycle(n, 1e-2, cbs=losses)
    return dict(
        losses=torch.stack(losses.all), weights=dict(learn.model.state_dict()), opt=learn.opt.state_dict(),
        lrs=learn.recorder.lrs, smooth=torch.stack(learn.recorder.losses),
        values=[list(o) for o in learn.recorder.values], iters=learn.recorder.iters,
        rand=(random.random(), np.random.rand(), torch.rand(1)), idxs=learn.dls.train.get_idxs(),
        grads=[p.requires_grad for p in learn.model.parameters()])

def assert_same(a, b): assert not (d := [k for k in a if not same(a[k], b[k])]), d

def assert_no_trace(make, search=search):
    "Two learners from one seed, one of which searches, train the same"
    def run(search):
        learn = make()
        search(learn)
        return train(learn)
    assert_same(run(noop), run(search))

def assert_left_alone(make):
    "A search leaves the learner as it was, and its training goes on as without one"
    learn = make()
    before = snapshot(learn)
    search(learn)
    assert_untouched(learn, before)
    assert_no_trace(make)

@cache
def reference(opt, workers, lr_find):
    "The training without `bs_find`"
    learn = fresh(opt, workers)
    lr = find_lr(learn) if lr_find else None
    return train(learn, 2), lr

@pytest.mark.parametrize('lr_find', [None,'before','after'])
@pytest.mark.parametrize('opt,workers', [('sgd',0), ('adam',0), ('adam',2)])
def test_training_is_the_same_bit_for_bit(opt, workers, lr_find):
    "The proof: training that follows does not know that `bs_find` took place; in both orders with `lr_find`"
    expected,lr = reference(opt, workers, bool(lr_find))
    learn = fresh(opt, workers)
    if lr_find=='before': assert find_lr(learn)==lr
    assert search(learn) is not None
    if lr_find=='after': assert find_lr(learn)==lr
    assert_same(expected, train(learn, 2))

@pytest.mark.parametrize('opt,kwargs', [
    ('adam', dict(method='sequential')), ('sgd', dict(method='sequential')), ('adam', dict(bs=40)), ('sgd', dict(bs=7)),
    ('adam', dict(lr=10.)), ('adam', dict(lr=slice(1e-4,1e-2), wd=.3)), ('adam', dict(show_plot=True)),
    ('adam', dict(suggest_funcs=None))], ids=str)
def test_training_is_the_same_with_every_option(opt, kwargs):
    "Also for the other method, another batch size, a learning rate that destroys the weights, a plot"
    assert_no_trace(partial(fresh, opt), partial(search, **kwargs))

def test_a_search_changes_what_the_proof_looks_at():
    "The proof is worth something only if a mock training that is not undone shows in it"
    expected = reference('adam', 0, False)[0]
    learn = fresh()
    learn.fit(1, 1e-2, cbs=limited(20, n_batch=10))
    got = train(learn, 2)
    assert not any(same(got[k], expected[k]) for k in ('losses','weights','opt','smooth','values','rand','idxs'))

def prepared(how, opt):
    learn = fresh(opt, splitter=halves) if how!='fitted' else fresh(opt)
    if how=='fitted': learn.fit(1, 1e-2)
    if how=='frozen': learn.freeze()
    if how=='unfrozen':
        learn.freeze()
        learn.fit_one_cycle(1, slice(1e-3,1e-2))
        learn.unfreeze()
    return learn

@pytest.mark.parametrize('how,opt', [
    ('fitted','sgd'), ('fitted','adam'), ('frozen','sgd'), ('frozen','adam'), ('unfrozen','adam'), ('fitted','adamw'),
    ('frozen','adamw')])
def test_training_goes_on_the_same_bit_for_bit(how, opt):
    "Also in mid-training: momenta, frozen groups and their hyper-parameters, a wrapped PyTorch optimizer"
    assert_no_trace(partial(prepared, how, opt))

def test_unwrapped_optimizer_is_the_same():
    "An `OptimWrapper` given ready-made as `opt_func` is the learner's property too"
    def learner():
        learn = fresh()
        learn.opt_func = OptimWrapper(opt=torch.optim.AdamW(learn.model.parameters()))
        return learn
    assert_left_alone(learner)

def test_no_schedule_and_no_callback_of_bs_find_stays():
    "A second search finds the same as the first: nothing accumulates"
    learn = fresh()
    assert search(learn) == search(learn)
    first = learn.recorder.bs_find_stats
    search(learn)
    assert first.equals(learn.recorder.bs_find_stats) and len(first)==3

def on_call(k, exc):
    "A function that raises `exc` when called the `k`th time; its state is out of sight"
    n = [0]
    def f(*args):
        n[0] += 1
        if n[0]==k: raise exc
    return f

def raise_in_forward(k, exc):
    def inject(learn): learn.model.register_forward_pre_hook(on_call(k, exc))
    return inject

def raise_in_loss(k, exc):
    def inject(learn):
        f,old = on_call(k, exc),learn.loss_func
        def loss(*args): f(); return old(*args)
        learn.loss_func = loss
    return inject

def raise_in_backward(k, exc):
    def inject(learn): learn.model[-1].register_full_backward_hook(on_call(k, exc))
    return inject

def raise_in_data(k, exc):
    def inject(learn):
        f,old = on_call(k, exc),learn.dls.train.after_item
        learn.dls.train.after_item = lambda o: (f(), old(o))[1]
    return inject

def raise_in_callback(event, k, exc):
    "A callback that shapes the training and comes last"
    def inject(learn): learn.add_cb(Callback(**{event: on_call(k, exc)})).cbs[-1].__dict__['order'] = 1000
    return inject

stop,oops = KeyboardInterrupt,RuntimeError('oops')

accidents = {
    'nothing': (noop, None), 'interrupt in batch 3': (raise_in_forward(3, stop), stop),
    'interrupt in batch 25': (raise_in_forward(25, stop), stop), 'interrupt in loss 3': (raise_in_loss(3, stop), stop),
    'interrupt in loss 25': (raise_in_loss(25, stop), stop),
    'interrupt in backward': (raise_in_backward(12, stop), stop), 'interrupt in data': (raise_in_data(400, stop), stop),
    'error in forward': (raise_in_forward(1, oops), RuntimeError),
    'error in forward 15': (raise_in_forward(15, oops), RuntimeError),
    'error in data': (raise_in_data(100, oops), RuntimeError),
    'error in callback': (raise_in_callback('after_backward', 4, oops), RuntimeError),
    'error before a step': (raise_in_callback('before_step', 2, oops), RuntimeError)}

@pytest.mark.parametrize('accident,state', [
    *((o,'fitted') for o in accidents),
    *((o,s) for o in ('nothing','interrupt in batch 3','interrupt in batch 25','error in forward') for s in ('fresh','frozen'))])
def test_nothing_changes(accident, state):
    "After return, interrupt and error every field is as before: no optimizer where there was none, momenta where there were some"
    inject,exc = accidents[accident]
    learn = prepared(state, 'adam')
    inject(learn)
    before = snapshot(learn)
    if exc is None: search(learn)
    else:
        with pytest.raises(exc): search(learn)
    assert_untouched(learn, before)

def test_snapshot_sees_a_search_that_is_not_undone():
    "The snapshot is worth something only if it sees the traces of a mock training"
    learn = fresh()
    before = snapshot(learn)
    with learn.no_logging(): learn.fit(2, 1e-2, cbs=limited(30, n_batch=10))
    seen = changes(before, snapshot(learn))
    for k in ('opt','dls.loaders[0].rng.rng','dl','iter','final_record','cbs[1].lrs.len',
              'model._modules[0]._parameters[weight].tensor','model._modules[1]._buffers[running_mean].tensor'):
        assert f'learn.{k}' in seen, k
    for k in ('py','np','torch'): assert k in seen

@pytest.mark.parametrize('exc', [stop,oops])
def test_nothing_changes_when_a_suggestion_fails(exc):
    "A suggestion function comes after the mock training, and fails without it"
    learn = prepared('fitted', 'sgd')
    before = snapshot(learn)
    def failing(rec): raise exc
    with pytest.raises((stop,RuntimeError)): search(learn, suggest_funcs=failing)
    assert_untouched(learn, before)

@pytest.mark.parametrize('lr', [1e30,1e-2])
@pytest.mark.parametrize('method', ['accumulate','sequential'])
def test_nothing_changes_when_the_loss_becomes_nan(lr, method):
    "Weights, running statistics and momenta full of NaN are put back"
    learn = prepared('fitted', 'sgd')
    if lr < 1:
        n,old = [0],learn.loss_func
        def loss(*args): n[0] += 1; return old(*args)*(math.nan if n[0]>=15 else 1)
        learn.loss_func = loss
    before = snapshot(learn)
    with pytest.warns(UserWarning, match='NaN'): search(learn, lr=lr, method=method)
    assert_untouched(learn, before)

def test_grads_and_modes_stay():
    "Gradients that the user holds, a layer in eval mode and a frozen layer stay; a parameter without a gradient keeps none"
    learn = fresh()
    learn.model.train()
    learn.model[1].eval()
    learn.model[-1].bias.requires_grad_(False)
    learn.model[0].weight.grad = torch.ones_like(learn.model[0].weight)
    before = snapshot(learn)
    search(learn)
    assert_untouched(learn, before)
    assert learn.model[6].weight.grad is None and not learn.model[1].training and learn.model[5].training

def test_workers_leave_nothing(tmp_path):
    "An interrupt in the middle of an epoch with worker processes"
    learn = fresh(workers=2)
    raise_in_forward(25, stop)(learn)
    before = snapshot(learn)
    with pytest.raises(stop): search(learn)
    assert_untouched(learn, before)

class Unruly(nn.Module):
    "A model with state in unusual places"
    def __init__(self):
        super().__init__()
        self.lin,self.seen,self.cache,self.n = nn.Linear(64,10),[],{},0
        self.register_buffer('tokens', torch.zeros(1,1).expand(5,3))
    def forward(self, x):
        self.n += 1
        self.seen.append(self.n)
        self.cache['last'] = self.n
        if self.n==2: self.register_buffer('late', torch.ones(1))
        return self.lin(x.view(-1,64)) + self.tokens.sum()

def test_attributes_of_modules_stay():
    "Lists, dictionaries, counters and buffers that a model makes while it runs; a buffer whose elements share their memory"
    learn = fresh()
    learn.model = Unruly()
    before = snapshot(learn)
    search(learn)
    assert_untouched(learn, before)

class Stateful(nn.Module):
    "A model with state in plain attributes"
    def __init__(self, nm): super().__init__(); self.lin,self.state,self.nm = nn.Linear(64,10),plain[nm][0](),nm
    def forward(self, x): return self.lin(x.view(-1,64)) + plain[self.nm][1](self.state)

plain = dict(
    tensor=(lambda: torch.zeros(1), lambda o: o.add_(.1)),
    array=(lambda: np.zeros(1), lambda o: float(np.add(o, .1, out=o)[0])),
    generator=(torch.Generator, lambda o: torch.rand(1, generator=o)),
    numpy=(partial(np.random.RandomState, 0), lambda o: o.rand()),
    python=(partial(random.Random, 0), lambda o: o.random()), deque=(deque, lambda o: (o.append(1), .1*len(o))[1]),
    numbers=(lambda: array('d', [0.]), lambda o: (o.append(1.), .1*len(o))[1]),
    objects=(lambda: np.array([[0.],None], dtype=object), lambda o: (o[0].append(1.), .1*len(o[0]))[1]))

@pytest.mark.parametrize('nm', plain)
def test_plain_attributes_of_modules_stay(nm):
    "What is no buffer and changes in place is state as well: the losses of a training after the search would differ"
    def learner():
        learn = fresh()
        learn.model = Stateful(nm)
        return learn
    assert_left_alone(learner)

class Logbook(Callback):
    "Appends to its own list after every batch; shapes nothing"
    def __init__(self): self.log = []
    def after_batch(self): self.log.append(self.learn.loss.item())

class Shaper(Logbook):
    "Takes part, since it may change the batch"
    def __init__(self): super().__init__(); self.stats,self.rng,self.sum = dict(n=0, seen=[]),np.random.RandomState(0),tensor(0.)
    def before_batch(self):
        self.stats['n'] += 1
        self.stats['seen'].append(len(self.y))
        self.sum += 1
        self.learn.xb = (self.x + self.rng.rand(),)

many = dict(
    save=SaveModelCallback, save_each=partial(SaveModelCallback, every_epoch=True), csv=CSVLogger, stop=EarlyStoppingCallback,
    reduce=ReduceLROnPlateau, nan=TerminateOnNaNCallback, progress=ProgressCallback, logbook=Logbook, shaper=Shaper, mixup=MixUp,
    accumulate=GradientAccumulation, clip=partial(GradientClip, .1), short=ShortEpochCallback)

@pytest.mark.parametrize('exc', [None,stop])
@pytest.mark.parametrize('nm', many)
def test_callbacks_stay(nm, exc, tmp_path):
    "Callbacks keep their place, their state and the disk, also after an interrupt; before and after they have trained"
    learn = fresh(path=tmp_path, cbs=many[nm]())
    cbs = list(learn.cbs)
    with learn.no_logging(): learn.fit(1, 1e-2)
    if exc: raise_in_forward(25, exc)(learn)
    before = snapshot(learn)
    if exc:
        with pytest.raises(exc): search(learn)
    else: assert search(learn) is not None
    assert_untouched(learn, before)
    assert all(map(operator.is_, learn.cbs, cbs)) and len(learn.cbs)==len(cbs)

def test_own_callback_that_only_watches_is_left_out():
    "A callback that shapes nothing hears nothing of the mock training"
    learn = fresh(cbs=[Logbook(), Shaper()])
    raise_in_callback('after_batch', 1, AssertionError)(learn)
    assert search(learn) is not None
    assert learn.logbook.log==[] and learn.shaper.log==[] and learn.shaper.stats==dict(n=0, seen=[])

def test_callback_that_takes_part_is_seen():
    "A callback that shapes the batches does so in the search too, or the result would be for another training"
    ns = []
    for cbs in ([], Shaper()):
        learn = fresh(cbs=cbs)
        search(learn)
        ns.append(list(learn.recorder.noise))
    assert ns[0] != ns[1]

def test_loss_function_after_mixup_is_interrupted():
    "MixUp exchanges the loss function for its own while it trains, and would leave it there"
    learn = fresh(cbs=MixUp())
    lf = learn.loss_func
    raise_in_forward(3, stop)(learn)
    with pytest.raises(stop): search(learn)
    assert learn.loss_func is lf and lf.func.reduction=='mean'

@pytest.mark.parametrize('opt', ['sgd','adam'])
@pytest.mark.parametrize('cbs', [
    MixUp, partial(GradientClip, .1), partial(GradientAccumulation, 100),
    partial(SaveModelCallback, every_epoch=True)], ids=lambda o: str(getattr(o, 'func', o).__name__))
def test_training_with_callbacks_is_the_same(opt, cbs):
    "Callbacks with random numbers and counters of their own train on as if nothing had been"
    assert_no_trace(lambda: fresh(opt, cbs=cbs()))

def lm_learner(path):
    set_seed(0)
    texts = [torch.randint(0, 20, (n,)) for n in range(5,60)]
    dls = DataLoaders(*(LMDataLoader(texts, bs=8, seq_len=6, shuffle=o) for o in (True,False)), path=path, device='cpu')
    return Learner(
        dls, nn.Sequential(nn.Embedding(20,8), nn.Linear(8,20)), CrossEntropyLossFlat(),
        path=path).remove_cb(ProgressCallback)

@pytest.mark.parametrize('kwargs', [{}, dict(bs=16)], ids=str)
def test_language_model_order_stays(tmp_path, kwargs):
    "`LMDataLoader` shuffles its texts in place: the next epochs must not notice"
    def epochs(learn): return [torch.cat([x.flatten() for x,_ in learn.dls.train]) for _ in range(3)]
    expected = epochs(lm_learner(tmp_path))
    learn = lm_learner(tmp_path)
    before = snapshot(learn)
    search(learn, **kwargs)
    assert_untouched(learn, before)
    assert same(expected, epochs(learn)) and not same(*expected[:2])
    assert_no_trace(partial(lm_learner, tmp_path), partial(search, **kwargs))

def test_interrupted_language_model_order_stays(tmp_path):
    "Likewise after an interrupt in the second epoch"
    def interrupted(learn):
        raise_in_forward(len(learn.dls.train)+2, stop)(learn)
        with pytest.raises(stop): search(learn, num_it=100)
    assert_no_trace(partial(lm_learner, tmp_path), interrupted)

def test_pytorch_loader_with_a_generator_stays(tmp_path):
    "A loader of PyTorch's own draws its order from its own generator"
    def learner():
        learn = fresh(path=tmp_path)
        ds = list(learn.dls.train.dataset)
        learn.dls = DataLoaders(
            *(torch.utils.data.DataLoader(
                ds, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(o)) for o in (1,2)),
            path=tmp_path)
        learn.dls._device = torch.device('cpu')
        return learn
    learn = learner()
    before = snapshot(learn)
    search(learn)
    assert_untouched(learn, before)
    def order(search):
        learn = learner()
        search(learn)
        return [y for _ in range(2) for _,y in learn.dls.train]
    assert same(order(noop), order(search))

class Augmented:
    "Items with random numbers that are drawn where the item is made"
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i][0]+torch.randn(1), self.items[i][1]

def test_persistent_workers_stay(tmp_path):
    "PyTorch's workers can live on from epoch to epoch, and their random states with them"
    def epoch(search):
        learn = fresh(path=tmp_path)
        dl = torch.utils.data.DataLoader(
            Augmented(list(learn.dls.train.dataset)), batch_size=16, num_workers=1, persistent_workers=True)
        learn.dls = DataLoaders(dl, learn.dls.valid, path=tmp_path)
        learn.dls._device = torch.device('cpu')
        list(dl)
        search(learn)
        return [x for x,_ in dl]
    assert same(epoch(noop), epoch(search))

def tabular(path):
    set_seed(0)
    df = pd.DataFrame(np.random.randn(200,3), columns=list('abc'))
    df['y'] = np.where(df.a+df.b > 0, 'yes', 'no')
    dls = TabularDataLoaders.from_df(
        df, path, procs=[Normalize], cont_names=list('abc'), y_names='y', y_block=CategoryBlock(), bs=16, device='cpu')
    return tabular_learner(dls, layers=[8], metrics=accuracy, path=path).remove_cb(ProgressCallback)

_deploy = """
import sys
sys.modules['fastai_bs_finder'] = None
from fastai.tabular.all import *
try: import fastai_bs_finder
except ImportError: pass
else: raise SystemExit('the package should be out of reach')
learn = load_learner(sys.argv[1])
assert type(learn.recorder) is Recorder and learn.recorder is learn.cbs[1] and not hasattr(learn, 'bs_find'), learn.cbs
print(repr(learn.predict(pd.Series(dict(a=1., b=-.3, c=.2)))[2].tolist()))
"""

def test_export_opens_without_this_package(tmp_path):
    "People deploy such files where this package is not installed"
    learn = tabular(tmp_path)
    learn.fit(1)
    learn.bs_find(1e-2, num_it=20, n_batch=5, show_plot=False)
    want = learn.predict(pd.Series(dict(a=1., b=-.3, c=.2)))[2].tolist()
    learn.export('sub.pkl')
    assert b'fastai_bs_finder' not in (tmp_path/'sub.pkl').read_bytes() and isinstance(learn.recorder, BSRecorder)
    assert len(learn.recorder.noise)==4
    (tmp_path/'elsewhere').mkdir()
    got = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', _deploy, tmp_path/'sub.pkl'], cwd=tmp_path/'elsewhere',
        capture_output=True, text=True)
    assert not got.returncode, got.stderr
    assert eval(got.stdout)==want

def test_recorder_is_the_same_object():
    "It becomes a `BSRecorder` and keeps the logs of the training before"
    learn = prepared('fitted', 'adam')
    rec,logs = learn.recorder,{k: list(getattr(learn.recorder, k)) for k in ('lrs','losses','iters','values','metric_names')}
    assert type(rec) is Recorder and len(logs['lrs'])==22
    search(learn)
    assert learn.recorder is rec and rec in learn.cbs and isinstance(rec, BSRecorder) and isinstance(rec, Recorder)
    assert all(same(logs[k], list(getattr(rec, k))) for k in logs) and len(rec.noise)==3
    rec.plot_loss()

def test_training_logs_in_the_same_recorder():
    "What comes after the search is recorded as ever, beside the measurements"
    learn = fresh()
    search(learn)
    learn.fit(1, 1e-2)
    assert len(learn.recorder.losses)==22 and len(learn.recorder.noise)==3 and len(learn.recorder.values)==1

def hooks(learn): return [h for p in learn.model.parameters() for h in (p._backward_hooks or {})]

@pytest.mark.parametrize('exc', [stop,oops])
def test_interrupted_callback_leaves_no_hook(exc):
    "In an ordinary `fit` as well an interrupt must not leave hooks on the parameters"
    learn,seen = fresh(),[]
    learn.model.register_forward_pre_hook(lambda *_: seen.append(len(hooks(learn))))
    raise_in_forward(3, exc)(learn)
    with pytest.raises((stop,RuntimeError)): learn.fit(1, 1e-2, cbs=BSFinder())
    assert seen[-1] > 0 and not hooks(learn) and len(learn.cbs)==3 and not hasattr(learn, 'bs_finder')

def test_callback_leaves_no_hook():
    "Nor does a fit that ends well, in each of two fits with the same callback"
    learn,cb = fresh(),BSFinder(n_batch=5)
    for _ in range(2):
        learn.fit(1, 1e-2, cbs=cb)
        assert not hooks(learn) and len(learn.recorder.noise)==4

@pytest.mark.parametrize('opt', opts)
def test_sequential_callback_only_watches(opt):
    "The sequential method measures a training without changing it"
    def run(*cbs):
        learn = fresh(opt)
        learn.fit(2, 1e-2, cbs=cbs)
        return learn,dict(
            losses=learn.recorder.losses, weights=learn.model.state_dict(),
            opt=learn.opt.state_dict()) | {f'then {k}': v for k,v in train(learn).items()}
    (_,expected),(learn,got) = run(),run(BSFinder(method='sequential', n_batch=5))
    assert_same(expected, got)
    assert len(learn.recorder.noise)==8

class Cache:
    "What a forward hook keeps: a count and the last activation"
    def __init__(self): self.n,self.last = 0,None
    def __call__(self, m, i, o): self.n,self.last = self.n+1,o

class Skips(nn.Module):
    "As in a U-Net, one layer finds another's activation in an object that both hold; and it keeps notes in a dictionary"
    def __init__(self, hook): super().__init__(); self.hook,self.notes = hook,dict(n=0, last=None)
    def forward(self, x):
        self.notes.update(n=self.notes['n']+1, last=x)
        return x + self.hook.last.mean()

def test_shared_hook_with_an_activation(learn):
    "An activation within a graph can't be copied; all around it still is, also where two modules share it"
    hook = Cache()
    learn.model[0].register_forward_hook(hook)
    learn.model[0].hook = hook
    learn.model.append(Skips(hook))
    with learn.no_logging(): learn.lr_find(num_it=10, show_plot=False) # ends in training mode, with activations in the hook
    assert hook.last.requires_grad
    n,last,notes = hook.n,hook.last,dict(learn.model[-1].notes)
    learn.bs_find(1e-3, num_it=40, show_plot=False)
    assert hook.n==n and hook.last is last and learn.model[-1].notes==notes

# --- state that hangs on the learner in other ways

def search_and_profile(learn):
    search(learn)
    learn.bs_profile(show_plot=False, max_bs=16)

class Augment(ItemTransform):
    "Generators of its own"
    def __init__(self): self.np,self.py,self.torch = np.random.default_rng(0),random.Random(0),torch.Generator().manual_seed(0)
    def encodes(self, o): return o[0] + .1*(self.np.random()+self.py.random()+torch.rand((), generator=self.torch)), o[1]

def test_generators_of_transforms_stay():
    "The next training draws what it would have drawn"
    def make():
        learn = fresh()
        learn.dls.train.after_item.add(Augment())
        return learn
    assert_no_trace(make)

class Drawing:
    "A data set that draws by itself"
    def __init__(self, items): self.items,self.rng = items,np.random.default_rng(0)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i][0]+float(self.rng.normal()),self.items[i][1]

def test_generators_of_datasets_stay():
    def make():
        learn = fresh()
        ds = Drawing(learn.dls.train.dataset[:128])
        learn.dls = DataLoaders.from_dsets(ds, ds, bs=16, num_workers=0, shuffle=True, device='cpu', path=learn.path)
        return learn
    assert_no_trace(make)

class Drifting:
    "A loss with state that is no module: a weight that it moves, a count, and a module inside"
    def __init__(self): self.crit,self.n,self.weight = nn.CrossEntropyLoss(),0,torch.ones(10)
    def __call__(self, pred, y):
        self.n += 1
        self.weight = .99*self.weight+.02*pred.detach().softmax(-1).mean(0)
        return self.crit(pred*self.weight, y)

class DriftingModule(nn.Module):
    def __init__(self): super().__init__(); self.register_buffer('queue', torch.zeros(10))
    def forward(self, pred, y):
        self.queue.mul_(.9).add_(pred.detach().mean(0))
        return nn.functional.cross_entropy(pred-.1*self.queue, y)

class Owner:
    def __init__(self): self.inner = DriftingModule()
    def loss(self, pred, y): return self.inner(pred, y)

def closure():
    inner = DriftingModule()
    return lambda pred, y: inner(pred, y)

stateful_losses = dict(
    object=Drifting, module=DriftingModule, method=lambda: Owner().loss, partial=lambda: partial(DriftingModule()),
    closure=closure)

@pytest.mark.parametrize('nm', stateful_losses)
def test_state_of_losses_stays(nm):
    "However the loss holds it"
    def make():
        learn = fresh()
        learn.loss_func = stateful_losses[nm]()
        return learn
    assert_no_trace(make)

class Extra(Learner):
    "A second optimizer, averaged weights, and things that its steps append to"
    def create_opt(self):
        super().create_opt()
        self.head_opts = [torch.optim.Adam(self.model[-1].parameters(), 1e-3)]
        self.averaged = torch.optim.swa_utils.AveragedModel(self.model)
        self.norms,self.counts,self.last,self.history = [],Counter(),{},deque(maxlen=5)
    def _step(self):
        super()._step()
        self.head_opts[0].step()
        self.averaged.update_parameters(self.model)
        self.norms.append(float(self.model[-1].weight.norm()))
        self.counts['steps'] += 1
        self.last['loss'] = self.loss.item()
        self.history.append(self.counts['steps'])

@pytest.mark.parametrize('first', ['search','fit'])
def test_a_learner_with_state_of_its_own(first):
    def make():
        learn = fresh()
        learn.__class__ = Extra
        if first=='fit':
            with learn.no_logging(): learn.fit(1, 1e-2)
        return learn
    def facts(learn): return [learn.head_opts[0].state_dict(), learn.averaged.state_dict(), learn.norms, dict(learn.counts),
                              learn.last, list(learn.history)]
    def run(both):
        learn = make()
        both(learn)
        return train(learn) | dict(facts=facts(learn))
    assert_same(run(noop), run(search_and_profile))

class Tracks(Callback):
    "Hooks and attributes that a callback leaves on the model"
    def before_fit(self):
        self.handle = next(self.model.parameters()).register_hook(lambda g: g*1.)
        self.model.tag = 'trained'
    def before_batch(self): self.learn.xb = self.xb

def test_hooks_on_parameters_and_attributes_stay():
    learn = fresh(cbs=Tracks())
    search(learn), learn.bs_profile(show_plot=False, max_bs=16)
    assert not next(learn.model.parameters())._backward_hooks and not hasattr(learn.model, 'tag')

class Words(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.lin = nn.Embedding(17, 4, sparse=True),nn.Linear(4, 10)
    def forward(self, x): return self.lin(self.emb((16*x).round().long().clamp(0, 16)).mean((1,2,3)))

@pytest.mark.parametrize('reduction', ['mean','sum'])
@pytest.mark.parametrize('opt', [torch.optim.Adagrad, torch.optim.SGD])
def test_sparse_gradients_that_a_fit_left(opt, reduction):
    "They are put back, and so is the optimizer's state"
    def make():
        learn = fresh()
        learn.model,learn.opt_func = Words(),partial(OptimWrapper, opt=opt)
        learn.loss_func = nn.CrossEntropyLoss(reduction=reduction)
        with learn.no_logging(): learn.fit(1, 1e-3)
        x,y = learn.dls.train.one_batch()
        learn.loss_func(learn.model(x), y).backward() # a leftover
        return learn
    def run(both):
        learn = make()
        both(learn)
        grad = learn.model.emb.weight.grad
        assert grad.is_sparse
        with learn.no_logging(): learn.fit(1, 1e-3)
        return dict(grad=grad, weights=weights(learn), opt=learn.opt.state_dict())
    assert_same(run(noop), run(search_and_profile))

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss'])
@pytest.mark.parametrize('half', ['to_fp16','to_bf16'])
def test_autocast_is_not_nested(half, event):
    "An interrupt between where mixed precision begins and ends"
    learn = getattr(fresh(), half)()
    class Stop(Callback):
        order = 1000
    setattr(Stop, event, raising(5, stop))
    learn.add_cb(Stop())
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    with pytest.raises(stop): search(learn)
    assert not torch.is_autocast_enabled('cpu') and torch.autocast_increment_nesting()==depth
    torch.autocast_decrement_nesting()

def raising(n, exc):
    count = iter(range(10**9))
    def f(self):
        self.learn.xb = self.xb # takes part
        if next(count)==n: raise exc()
    return f

def test_nothing_is_patched_meanwhile():
    "Two searches at a time in two threads, while a third watches what everybody shares"
    shared = lambda: (Tensor.__deepcopy__, nn.Parameter.__deepcopy__, nn.Module.__setattr__, signal.getsignal(signal.SIGINT))
    before,seen,done = shared(),[],threading.Event()
    def watch():
        while not done.wait(.001): seen.append(shared())
    learners = [fresh(), fresh()]
    threads = [threading.Thread(target=search, args=(o,)) for o in learners]
    watcher = threading.Thread(target=watch)
    for t in (watcher,*threads): t.start()
    for t in threads: t.join()
    done.set(), watcher.join()
    assert seen and set(seen)=={before}
    assert all(o.recorder.noise for o in learners)

def test_search_inside_a_fit_that_is_watched():
    "The outer fit measures what it would have measured"
    class Inside(Callback):
        def after_batch(self):
            if self.train_iter==20 and self.on: search(self.learn)
    def run(on):
        learn = fresh()
        cb,finder = Inside(),BSFinder()
        cb.on = on
        with learn.no_logging(): learn.fit(2, 1e-2, cbs=[cb,finder])
        return finder.search.noise,finder.search.n_iter,weights(learn)
    assert same(run(False), run(True))

def test_search_while_the_recorder_is_taken_away():
    learn = fresh()
    rec = learn.recorder
    with learn.removed_cbs([rec]): search(learn)
    assert list(learn._grab_cbs(Recorder))==[rec] and learn.recorder is rec

def test_lazy_layers_before_their_first_batch():
    def make():
        learn = fresh()
        learn.model = nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))
        return learn
    learn = make()
    search(learn), learn.bs_profile(show_plot=False, max_bs=16)
    assert isinstance(learn.model[1], nn.LazyLinear) and isinstance(learn.model[1].weight, nn.parameter.UninitializedParameter)
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.model[1].weight.shape==(16,64)

class Pair:
    "A collection of loaders that has no more than these two"
    def __init__(self, train, valid): self.train,self.valid = train,valid
    def __getitem__(self, i): return (self.train,self.valid)[i]

def test_collection_with_only_train_and_valid():
    learn = fresh()
    learn.dls = Pair(learn.dls.train, learn.dls.valid)
    with learn.no_logging(): learn.fit(1, 1e-3)
    search(learn)
    assert len(learn.bs_profile(show_plot=False, max_bs=16)) >= 1

@pytest.mark.parametrize('where', ['dataset','dls','callback'])
def test_data_are_shared_and_not_copied(where):
    "64 MB of somebody's data take neither memory nor a place in the profile"
    learn,data = fresh(),torch.zeros(2**24)
    if where=='callback': learn.add_cb(Holds(data))
    elif where=='dls': learn.dls.train.cache = data
    else:
        learn.dls = DataLoaders.from_dsets(Drawing(learn.dls.train.dataset[:64]), bs=16, num_workers=0, device='cpu')
        learn.dls.train.dataset.cache = data
    held = learn.holds.data if where=='callback' else learn.dls.train.cache if where=='dls' else learn.dls.train.dataset.cache
    assert held is data
    with preserve(learn): assert largest_copy() < 2**20

class Holds(Callback):
    def __init__(self, data): self.data = data

def largest_copy():
    "Bytes of the largest tensor that a running `preserve` holds a copy of"
    sizes = [0]
    for f in gc.get_objects():
        if isinstance(f, FunctionType) and f.__qualname__=='_save_tensor.<locals>.restore':
            sizes += [c.cell_contents.nbytes for c in f.__closure__ if isinstance(c.cell_contents, Tensor)]
    return max(sizes)
