"What a measurement costs, how it counts, how sure it is: everything about it that does not depend on the kind of learner."
import warnings
from contextlib import ExitStack
from unittest.mock import patch as mock_patch
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import *

methods = 'accumulate','split','per_example','sequential'

def plain_learner(bs=64, n=1437, model=None, loss=None, **kwargs):
    "Without batch norm and dropout, so that a batch is the sum of its parts"
    set_seed(0)
    dls = DataLoaders.from_dsets(digits()[:n], digits()[:bs], bs=bs, num_workers=0, shuffle=True, drop_last=True, device='cpu')
    model = model or nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128,10))
    return Learner(dls, model, loss or CrossEntropyLossFlat(), **kwargs).remove_cb(ProgressCallback)

def search(learn, **kwargs): return learn.bs_find(**dict(lr=1e-2, num_it=40, n_batch=10, show_plot=False, suggest_funcs=BSSuggestion.Critical) | kwargs)

# --- nothing waits for the device

class Scalars(TorchDispatchMode):
    "Counts how often a number is taken out of a tensor"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

def waits(f):
    "Numbers taken out one at a time, lists of them, and whole tensors fetched"
    n = dict.fromkeys(('tolist','cpu','numpy'), 0)
    def counting(nm, orig):
        def _f(self, *args, **kwargs): n[nm] += 1; return orig(self, *args, **kwargs)
        return _f
    with Scalars() as scalars, ExitStack() as stack:
        for nm in n: stack.enter_context(mock_patch.object(Tensor, nm, counting(nm, getattr(Tensor, nm))))
        f()
    return scalars.n,n['tolist'],n['cpu']+n['numpy']

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(reduction='sum')], ids=['mean','sum'])
def test_waits_for_the_device_once_a_measurement(method, loss):
    "A loader of tensors that takes none out itself: four times as many batches, as many measurements, as many waits"
    def n(num_it, n_batch):
        learn = plain_learner(loss=loss)
        xs,ys = (torch.stack(o).as_subclass(Tensor) for o in zip(*learn.dls.train.dataset)) # a subclass would take each list twice
        class Batches:
            dataset = learn.dls.train.dataset
            def __len__(self): return 20
            def __iter__(self): return iter([(xs[i*64:i*64+64],ys[i*64:i*64+64]) for i in range(20)])
        learn.dls.loaders[0] = Batches()
        return waits(lambda: search(learn, num_it=num_it, n_batch=n_batch, method=method))
    assert n(10, 5)==n(40, 20)==(0,2,0)

def test_waits_are_counted():
    "What the test above is worth"
    t = torch.ones(3)
    assert waits(lambda: (t.sum().item(), bool(t[0] > 0), float(t[1]), t.tolist(), t.cpu(), t.numpy()))==(3,1,2)
    class Impatient(Callback):
        def before_step(self): self.learn.loss.item()
    learn = plain_learner()
    learn.add_cb(Impatient())
    assert waits(lambda: search(learn))[0] >= 40

# --- split: the user's own trajectory

@pytest.mark.parametrize('opt', [SGD, Adam], ids=['SGD','Adam'])
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), CrossEntropyLossFlat(reduction='sum')], ids=['mean','sum'])
@pytest.mark.parametrize('bs', [64,30])
def test_split_steps_as_normal_training_does(opt, loss, bs):
    "The same weights after as many batches, also where micro-batches differ in size and where the loss is a sum"
    plain,split = (plain_learner(bs, loss=loss, opt_func=opt) for _ in range(2))
    for learn,cbs in ((plain,None), (split,BSFinder(method='split', n_batch=5))):
        with learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
    for a,b,start in zip(plain.model.parameters(), split.model.parameters(), plain_learner(bs).model.parameters()):
        assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, start, atol=1e-4)
    assert split.recorder.search.n_iter==list(range(5, len(split.dls.train)+1, 5))

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), CrossEntropyLossFlat(reduction='sum')], ids=['mean','sum'])
def test_accumulate_steps_with_the_gradient_of_one_batch(loss):
    "The step of a window is as long as the step of a batch of the usual size, for a sum too"
    def step(bs, n_batch):
        learn,steps = plain_learner(bs, loss=loss, opt_func=SGD),[]
        class Step(Callback):
            order = 100
            def before_step(self): steps.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]))
        with learn.no_logging(): learn.fit(1, 1e-12, cbs=[Step()] + list(limited(20, n_batch=n_batch, method='accumulate') if n_batch else []))
        return torch.stack(steps)
    whole,windows = step(64, None),step(64, 10)
    assert len(whole)==22 and len(windows)==2
    assert torch.allclose(windows[0], whole[:10].mean(0), rtol=1e-3, atol=1e-5*whole.abs().max())

def test_k_is_the_number_of_micro_batches():
    sizes = []
    learn = plain_learner()
    class Sizes(Callback):
        def before_batch(self): sizes.append(len(self.xb[0]))
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=[*limited(3, method='split', k=5), Sizes()])
    assert sizes==[12,13,13,13,13]*3

def test_batches_too_small_to_cut():
    "That is known beforehand, and said; the callback can only say it afterwards"
    learn = plain_learner(bs=3)
    with pytest.raises(ValueError, match="at least 4 items in it, got batches of 3. Use method='accumulate'"): search(learn, method='split')
    with pytest.raises(ValueError, match='at least 2 items in it, got batches of 1'): search(learn, method='per_example', bs=1)
    assert search(learn) is not None and search(learn, method='split', bs=4, num_it=200) is not None

def test_a_search_that_diverges_says_so():
    with pytest.warns(UserWarning, match='The loss grew [0-9,.]+ times during the search.*Lower the learning rate'): search(plain_learner(opt_func=SGD), lr=30., num_it=60)

def test_an_interval_without_an_upper_end_is_said():
    "Too few batches for the interval to know anything: the number comes with a warning"
    with pytest.warns(UserWarning, match='noise scale may be far off: critical batch size (unknown|at least).*Raise num_it'): search(plain_learner(), lr=1e-12, num_it=20, n_batch=10)

def test_batches_that_cannot_be_cut():
    learn = plain_learner()
    learn.dls.loaders[0] = learn.dls.train.new(create_batch=lambda items: (torch.stack([x for x,_ in items]), torch.stack([y for _,y in items]), tensor(1.)))
    learn.dls.n_inp,learn.loss_func = 1,lambda p,y,w: F.cross_entropy(p, y.as_subclass(Tensor))*w
    with pytest.raises(ValueError, match=r"got first dimensions \[64, 64, 0\]. Use method='accumulate'"): search(learn, method='split')
    assert search(learn) is not None

def test_auto_measures_batches_that_cannot_be_cut():
    "It would cut them, as the windows are larger than half of the data, and holds the weights instead"
    def measured(method):
        learn = plain_learner(n=256)
        learn.dls.loaders[0] = learn.dls.train.new(create_batch=lambda items: (torch.stack([x for x,_ in items]), torch.stack([y for _,y in items]), tensor(1.)))
        learn.dls.n_inp,learn.loss_func = 1,lambda p,y,w: F.cross_entropy(p, y.as_subclass(Tensor))*w
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            search(learn, method=method)
        return learn.recorder.bs_find_stats
    auto,accumulate = measured('auto'),measured('accumulate')
    assert len(auto) >= len(accumulate)-1
    assert np.allclose(auto.noise.iloc[-1], accumulate.noise.iloc[-1], rtol=.3)

def test_auto_cuts_such_small_data():
    "What the test above is worth"
    learn,sizes = plain_learner(n=256),[]
    class Sizes(Callback):
        def before_batch(self): sizes.append(len(self.yb[0]))
    learn.add_cb(Sizes())
    search(learn)
    assert set(sizes)=={16}

# --- per_example

@pytest.mark.parametrize('method', ['per_example','split'])
def test_agrees_with_whole_batches(method):
    "At weights that stand still, over ten epochs: the same examples in batches of 64 and, one at a time or in parts, within them"
    def measured(method):
        learn = plain_learner()
        search(learn, lr=1e-12, num_it=220, beta=1, method=method)
        return np.array([learn.recorder.noise[-1], learn.recorder.scale[-1]])
    assert np.allclose(measured(method)/measured('accumulate'), 1, atol=.05)

def test_per_example_names_batch_norm(learn):
    with pytest.raises(ValueError, match="batch norm ties those of a batch together, in 1. Use method='accumulate'"): search(learn, method='per_example')

def test_per_example_says_what_it_cannot_do():
    "Models and losses that look at numbers; mixed precision, which scales its loss"
    learn = plain_learner(loss=lambda p,y: F.cross_entropy(p, y.as_subclass(Tensor)) if p.sum() > 0 else p.sum())
    with pytest.raises(RuntimeError, match="(?s)single examples of this model and loss.*Use method='accumulate'"): search(learn, method='per_example')
    learn = plain_learner()
    for cb in (MixedPrecision(), MixUp()):
        with pytest.raises(ValueError, match=f"per_example.*{type(cb).__name__}.*Use method='accumulate'"), learn.added_cbs(cb): search(learn, method='per_example')

# --- how sure

def test_interval_is_around_the_noise_scale(learn):
    search(learn, num_it=100, beta=1)
    df = learn.recorder.bs_find_stats
    assert list(df)==['noise','scale','noise_scale','lower','upper'] and df.upper.iloc[0]==math.inf and df.lower.iloc[0]==0
    seen = df[df.noise_scale < math.inf].iloc[4:]
    assert len(seen) and (seen.lower < seen.noise_scale).all() and (seen.noise_scale < seen.upper).all() and seen.upper.iloc[-1] < math.inf

def test_tol_ends_the_search():
    "As soon as the interval is narrow enough, not before there are ten measurements, and at the latest after `num_it`"
    ends = {}
    for tol in (.15,.25,.9):
        learn = plain_learner()
        search(learn, lr=1e-12, num_it=400, tol=tol)
        df = learn.recorder.bs_find_stats
        ok = (df.lower >= (1-tol)*df.noise_scale) & (df.upper <= (1+tol)*df.noise_scale)
        assert ok.iloc[-1] and not ok.iloc[9:-1].any()
        ends[tol] = df.index[-1]
    assert 100 <= ends[.9] <= ends[.25] < ends[.15] < 400
    search(learn, lr=1e-12, num_it=120, tol=.01)
    assert learn.recorder.search.n_iter[-1]==120

@pytest.mark.parametrize('tol', [0,1,25,-.1])
def test_tol_is_a_share(learn, tol):
    with pytest.raises(ValueError, match='tol must be between 0 and 1'): search(learn, tol=tol)

@pytest.mark.parametrize('kwargs,match', [(dict(k=1),'k must be at least 2'), (dict(k=2.5),'k must be a whole number'), (dict(reduction='none'),"reduction must be 'mean', 'sum' or None")], ids=str)
def test_other_parameters(learn, kwargs, match):
    with pytest.raises(ValueError, match=match): search(learn, method='split', **kwargs)

def test_drowned_signal_says_at_least():
    "Random labels, and weights that fit them as well as can be"
    learn = plain_learner(model=nn.Sequential(nn.Flatten(), nn.Linear(64,10)))
    set_seed(1)
    learn.dls.loaders[0].dataset = [(x,TensorCategory(random.randrange(10))) for x,_ in digits()[:1437]]
    with learn.no_logging(): learn.fit(30, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sugg = search(learn, lr=1e-6, num_it=100, n_batch=2, bs=8)
    row = learn.recorder.settled()
    assert learn.recorder.search.upper[-1]==math.inf and row.lower > 0 and learn.recorder.bs_find_summary().startswith(f'critical batch size at least {row.lower:,.0f}')

# --- beta counts batches

@pytest.mark.parametrize('method', ['accumulate','split'])
def test_beta_means_the_same_for_every_n_batch(method):
    "An average's reach in batches: measurements of 5 batches weigh beta**5 less each, those of 20 beta**20"
    for n_batch in (5,20):
        learn,(finder,end) = plain_learner(),limited(100, n_batch=n_batch, beta=.97, method=method)
        with learn.no_logging(): learn.fit(5, 1e-3, cbs=[finder,end])
        raw = np.array([r[1] for r in finder.running.rows])
        w = .97**(n_batch*np.arange(len(raw))[::-1])
        assert len(raw)==100//n_batch and np.isclose(learn.recorder.noise[-1], (w*raw).sum()/w.sum(), rtol=1e-4)

# --- what is chosen

def test_auto_cuts_batches_where_windows_exceed_the_data():
    "128 items in batches of 32: a window of 10 batches would hold each of them more than twice"
    def sizes(learn):
        seen = []
        learn.model.register_forward_pre_hook(lambda m,x: seen.append(len(x[0])))
        search(learn)
        return set(seen)
    assert sizes(plain_learner(32, n=128))=={8} and sizes(plain_learner(32))=={32}

# --- language models

class CharLM(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.head = nn.Embedding(20,8),nn.Linear(8,20)
    def forward(self, x): return self.head(self.emb(x))
    
class Stateful(CharLM):
    def reset(self): pass

def lm_learner(model):
    set_seed(0)
    ids = torch.randint(0, 20, (256,13))
    items = list(zip(ids[:,:-1], ids[:,1:]))
    dls = DataLoaders.from_dsets(items, items[:16], bs=16, shuffle=True, drop_last=True, num_workers=0, device='cpu')
    return Learner(dls, model, CrossEntropyLossFlat()).remove_cb(ProgressCallback)

def test_language_models_count_sequences_and_tokens():
    learn = lm_learner(CharLM())
    search(learn)
    df = learn.recorder.bs_find_stats
    assert learn.recorder.search.n_tokens==12 and np.allclose(df.tokens, 12*df.noise_scale)
    assert 'sequences of 12 tokens' in learn.recorder.bs_find_summary()
    fig = learn.recorder.plot_bs_find(return_fig=True)
    assert 'sequences of 12 tokens' in fig.axes[0].get_ylabel()

def test_no_tokens_elsewhere(learn):
    search(learn)
    assert learn.recorder.search.n_tokens is None and 'tokens' not in learn.recorder.bs_find_stats and 'sequences' not in learn.recorder.bs_find_summary()

def test_split_and_a_hidden_state():
    with pytest.warns(UserWarning, match='carries its hidden state'): search(lm_learner(Stateful()), method='split')

# --- what a review found

def test_split_keeps_the_schedule():
    "A one-cycle training with the last batch short: rates, weights and progress go by whole batches"
    def run(*cbs):
        learn,lrs = plain_learner(opt_func=SGD),[]
        learn.dls.loaders[0] = learn.dls.train.new(drop_last=False, bs=60)
        class Rates(Callback):
            order = 100
            def before_step(self): lrs.append((self.opt.hypers[-1]['lr'], self.train_iter))
        with learn.no_logging(): learn.fit_one_cycle(2, .1, cbs=[Rates(), *cbs])
        return lrs,learn.pct_train,torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    (lrs,pct,weights),(lrs2,pct2,weights2) = run(),run(BSFinder(method='split'))
    assert np.allclose(lrs, lrs2) and np.isclose(pct, pct2) and torch.allclose(weights, weights2, atol=1e-4)

class CancelAt(Callback):
    "Skip the rest of the batch in the `n`th `event`; before the backward pass, only that"
    def __init__(self, event, n):
        self.n,self.seen,self.error = n,0,CancelBackwardException if event=='before_backward' else CancelBatchException
        setattr(self, event, self.cancel)
    def cancel(self):
        self.seen += 1
        if self.seen==self.n: raise self.error()

cancels = pytest.mark.parametrize('event', ['after_loss','before_backward','after_backward'])

@cancels
def test_cancelled_micro_batch(event):
    "The parts of a batch that was given up half-way are in no step"
    def steps(*cbs):
        learn,res = plain_learner(opt_func=SGD),[]
        class Step(Callback):
            order = 100
            def before_step(self): res.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]))
        with learn.no_logging(): learn.fit(1, 1e-12, cbs=[Step(), BSFinder(method='split'), *cbs])
        return torch.stack(res), learn.recorder.search.n_iter
    (whole,n),(cut,n2) = steps(),steps(CancelAt(event, 7)) # the third part of the second batch
    assert torch.allclose(cut, torch.cat([whole[:1],whole[2:]]), atol=1e-6) and n2==n

@cancels
def test_cancelled_batch_of_a_window(event):
    "A batch that was given up is in no measurement"
    def recorded(first, *cbs):
        learn = plain_learner()
        learn.dls.loaders[0] = learn.dls.train.new(shuffle=False, dataset=learn.dls.train.dataset[first:])
        with learn.no_logging(): learn.fit(1, 1e-12, cbs=[BSFinder(method='accumulate', n_batch=2, beta=1), *cbs])
        return learn.recorder.noise[-1], learn.recorder.scale[-1]
    assert recorded(0, CancelAt(event, 1))==pytest.approx(recorded(64), rel=1e-4)

@pytest.mark.parametrize('event', ['before_step','after_backward'])
def test_callback_that_changes_gradients_early(event):
    "It gets a warning, unless it says that it comes later"
    class Clip(Callback):
        def clip(self): nn.utils.clip_grad_norm_(self.model.parameters(), .1)
    setattr(Clip, event, Clip.clip)
    with pytest.warns(UserWarning, match="Clip comes between the backward pass and BSFinder.*with an `order` above 6"): search(plain_learner(cbs=Clip()))
    if event=='before_step':
        Clip.order = 7
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            search(plain_learner(cbs=Clip()))

def test_loss_of_a_mean_and_a_sum():
    "Neither the one nor the other: said, and measured as what it is nearer to"
    learn = plain_learner(loss=lambda p,y: F.cross_entropy(p, y) + .01*F.cross_entropy(p, y, reduction='sum'))
    with pytest.warns(UserWarning, match='twice has 1.39 times its loss'): search(learn)

def test_all_batches_cancelled():
    "A search without a single loss says so"
    class Cancel(Callback):
        def before_batch(self): raise CancelBatchException()
    learn = plain_learner(cbs=Cancel())
    with pytest.warns(UserWarning, match='no measurement.*other callbacks cancelled every batch'): assert search(learn) is None

def test_a_finder_on_the_learner():
    "It takes no part in a search, and two in a fit are one too many"
    learn,other = plain_learner(),plain_learner()
    learn.add_cb(BSFinder(method='split'))
    search(learn), search(other)
    pd.testing.assert_frame_equal(learn.recorder.bs_find_stats, other.recorder.bs_find_stats)
    with learn.no_logging(), pytest.raises(ValueError, match='a BSFinder on the learner already'): learn.fit(1, cbs=BSFinder())

@pytest.mark.parametrize('method', ['accumulate','split'])
@pytest.mark.parametrize('added', [False,True], ids=['with cbs','on the learner'])
def test_interrupted_fit_leaves_nothing(method, added):
    "Neither part of a window in the gradients of the next fit nor hooks nor a loader that cuts"
    learn,twin,finder = plain_learner(),plain_learner(),BSFinder(method=method)
    class Stop(Callback):
        def after_backward(self):
            if self.train_iter==3: raise KeyboardInterrupt
    if added: learn.add_cb(finder)
    with learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-12, cbs=[Stop()] + ([] if added else [finder]))
    learn.remove_cb(finder)
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    assert type(learn.dl).__name__!='MicroBatches' and not any(p._backward_hooks for p in learn.model.parameters())

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(weight=torch.linspace(.2,4,10)), CrossEntropyLossFlat(ignore_index=0)], ids=['weight','ignore_index'])
def test_per_example_refuses_losses_that_are_no_mean(loss):
    with pytest.raises(ValueError, match="needs a loss that is the mean of the losses of single examples.*Use method='accumulate'"): search(plain_learner(loss=loss), method='per_example')

def test_no_noise_at_all():
    "Items that are all alike: an interval of no width, and still a sentence"
    rec = Search(n_items=100)
    rec.add(5, 0., 1., 0., 0.)
    assert rec.summary()=='critical batch size 0, 95% interval 0 to 0, so 1'

def test_several_processes_are_refused(learn):
    class DistributedTrainer(Callback): pass
    learn.add_cb(DistributedTrainer())
    with learn.no_logging(), pytest.raises(ValueError, match='search outside of `distrib_ctx`'): learn.fit(1, cbs=BSFinder())

def test_sum_of_single_losses():
    "A loss that says 'none' of a part of itself and adds up: what it does counts, not what it says"
    class Total(nn.CrossEntropyLoss):
        def __init__(self): super().__init__(reduction='none')
        def forward(self, p, y): return super().forward(p, y.as_subclass(Tensor)).sum()
    a,b = plain_learner(loss=Total()),plain_learner()
    search(a, lr=1e-12), search(b, lr=1e-12)
    assert np.allclose(a.recorder.noise, b.recorder.noise, rtol=1e-3)

def test_bf16_infinite_gradient():
    "A scaler that is not in use answers no overflow"
    learn = plain_learner()
    class Off(Callback):
        def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', enabled=False)
        def after_loss(self):
            if self.train_iter==13: self.learn.loss_grad = self.learn.loss_grad*math.inf
    learn.add_cb(Off())
    with pytest.warns(UserWarning, match='The gradient became NaN or infinite between batches 11 and 20'): search(learn)
