"Bad input is refused before any work starts, and a mock training that goes wrong keeps what it has measured."
import warnings
from fastai_bs_finder.finder import BSSuggestion
from conftest import *
def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return list(a)==list(b) and all(map(torch.equal, a.values(), b.values()))
def find_bs(learn, **kwargs): return learn.bs_find(**dict(lr=1e-2, num_it=30, n_batch=10, show_plot=False, suggest_funcs=BSSuggestion.Critical) | kwargs)

def refused(learn, match, exc=ValueError, **kwargs):
    "`bs_find` refuses, and neither the model nor the data nor an optimizer was touched"
    calls,before,rand,modes = [],weights(learn),random.getstate(),[m.training for m in learn.model.modules()]
    learn.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(exc, match=match): learn.bs_find(**kwargs)
    assert not calls and same(before, weights(learn)) and random.getstate()==rand and [m.training for m in learn.model.modules()]==modes
    assert learn.opt is None and not plt.get_fignums()
    assert not getattr(learn.recorder, 'losses', None) and not len(getattr(learn.recorder, 'noise', ()))

# --- input

@pytest.mark.parametrize('lr', [0, -1e-3, math.nan, math.inf, -math.inf, slice(0,1e-2), slice(1e-3,math.nan), slice(math.inf), [1e-3,-1e-3], np.array([1e-3,0.]), tensor(-1.)], ids=str)
def test_lr(learn, lr):
    "A learning rate that is not positive and finite, also within a slice or a list"
    refused(learn, 'lr must be positive and finite.*lr_find', lr=lr)

def test_default_lr(learn):
    "The learner's own rate is what counts when none is passed"
    learn.lr = math.nan
    refused(learn, 'lr must be positive and finite.*lr_find')
    learn.lr = 1e-2
    assert find_bs(learn, lr=None) is not None

@pytest.mark.parametrize('n_batch', [1,0,-3])
def test_n_batch(learn, n_batch):
    "One batch in a window has nothing to be compared with"
    refused(learn, 'n_batch must be at least 2', lr=1e-2, n_batch=n_batch)

@pytest.mark.parametrize('kwargs', [dict(num_it=9), dict(num_it=0), dict(num_it=-40), dict(num_it=5, n_batch=3)], ids=str)
def test_num_it(learn, kwargs):
    "Too few batches for two windows"
    refused(learn, 'at least 2 measurements.*Raise num_it or lower n_batch', lr=1e-2, **kwargs)

@pytest.mark.parametrize('kwargs,n', [(dict(num_it=10),2), (dict(num_it=14),2), (dict(num_it=4,n_batch=2),2), ({},40), (dict(n_batch=22),10)], ids=str)
def test_num_it_whole_windows(learn, kwargs, n):
    "The least that is not refused, whole windows only; and by default an epoch, at least 200 batches and ten windows"
    learn.bs_find(1e-2, show_plot=False, suggest_funcs=BSSuggestion.Critical, **kwargs)
    nb = kwargs.get('n_batch', 5)
    assert learn.recorder.search.n_iter==[nb*(i+1) for i in range(n)]

@pytest.mark.parametrize('bs', [0,-1,1438,10**6])
def test_bs(learn, bs):
    "A batch cannot be larger than the training set, nor empty"
    refused(learn, 'bs must be between 1 and the 1,437 items', lr=1e-2, bs=bs)

def test_bs_of_the_loader_is_checked_too(tmp_path):
    "Also when the loader has that very batch size"
    refused(make_learner(tmp_path, bs=2000), 'bs must be between 1 and the 1,437 items', lr=1e-2, bs=2000)

def test_loader_without_a_batch(tmp_path):
    "A training set smaller than a batch, with `drop_last`"
    refused(make_learner(tmp_path, bs=2000), 'no batch.*Pass a smaller bs', lr=1e-2)

def test_smaller_bs_helps(tmp_path):
    "What the message advises works"
    assert find_bs(make_learner(tmp_path, bs=2000), bs=64) is not None

@pytest.mark.parametrize('bs', [1,1437])
def test_extreme_bs(learn, bs):
    "The limits themselves are allowed"
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64,10)) # batch norm takes no batch of one
    assert find_bs(learn, bs=bs, num_it=4, n_batch=2) is not None

def test_bs_needs_fastai_loader(learn):
    "PyTorch's loader cannot be made anew with another batch size"
    learn.dls.loaders[0] = torch.utils.data.DataLoader(learn.dls.train.dataset, batch_size=64)
    refused(learn, 'another batch size needs a fastai DataLoader', lr=1e-2, bs=32)

class Stream(torch.utils.data.IterableDataset):
    "Items one after the other, number unknown"
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)

@pytest.mark.parametrize('new', [lambda ds: DataLoader(ds, bs=64, num_workers=0), lambda ds: torch.utils.data.DataLoader(ds, batch_size=64)], ids=['fastai','pytorch'])
def test_loader_without_length(learn, new):
    "The message says what to pass instead"
    learn.dls.loaders[0] = new(Stream(learn.dls.train.dataset))
    refused(learn, r'no length.*n=', lr=1e-2)

def test_loader_with_given_length(learn):
    "What the message advises works"
    learn.dls.loaders[0] = DataLoader(Stream(learn.dls.train.dataset), bs=64, n=1437, num_workers=0)
    assert find_bs(learn) is not None

def test_no_trainable_parameter(learn):
    "Everything is frozen: say how to unfreeze"
    for p in learn.model.parameters(): p.requires_grad_(False)
    refused(learn, 'no trainable parameter.*unfreeze', lr=1e-2)

def test_unfreeze_helps(learn):
    "What the message advises works where `freeze_to` froze all groups"
    learn.splitter = lambda m: [params(m[0]), params(m[2:])] # batch norm would stay trainable
    learn.freeze_to(2)
    with pytest.raises(ValueError, match='no trainable parameter.*unfreeze'): find_bs(learn)
    learn.unfreeze()
    assert find_bs(learn) is not None

def test_advice_for_a_model_frozen_by_hand(learn):
    "What the message advises works also where the user froze the parameters without fastai"
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError) as e: find_bs(learn)
    for advice in re.findall('`(.+?)`', str(e.value)): eval(advice)
    assert find_bs(learn) is not None

def test_no_parameter_of_the_optimizer_is_trainable(learn):
    "The splitter leaves out what could be trained: the optimizer would have nothing to do"
    learn.splitter = lambda m: [[m[0].weight]]
    learn.model[0].weight.requires_grad_(False)
    refused(learn, 'no trainable parameter.*unfreeze', lr=1e-2)

def test_no_loss(learn):
    "A learner without a loss function"
    learn.loss_func = None
    refused(learn, 'no loss function: pass one', lr=1e-2)

def test_no_target(learn):
    "Batches without a target have no loss"
    learn.dls.loaders[0] = learn.dls.train.new([(o[0],) for o in learn.dls.train.dataset])
    refused(learn, 'no target', lr=1e-2)

def test_method(learn):
    "An unknown method: name those that there are"
    refused(learn, "'accumulate', 'split', 'per_example', 'sequential'", lr=1e-2, method='exact')

@pytest.mark.parametrize('beta', [-.1,1.01,math.nan])
def test_beta(learn, beta):
    "A decay that is none"
    refused(learn, 'beta must be', lr=1e-2, beta=beta)

# --- suggestion functions

def biggest(rec): return int(max(rec.noise_scale))
def _hidden(rec): return 1
def other():
    def biggest(rec): return 7
    return biggest
class Callable_:
    def __call__(self, rec): return 3

@pytest.mark.parametrize('funcs', [(biggest,other()), (biggest,biggest), (biggest,partial(biggest)), (BSSuggestion.Critical,critical)], ids=['namesakes','twice','partial','critical'])
def test_two_of_the_same_name(learn, funcs):
    "Two fields of the result cannot have the same name"
    refused(learn, 'name of its own.*`def`', lr=1e-2, suggest_funcs=funcs)

@pytest.mark.parametrize('f', [lambda rec: 1, partial(lambda rec: 1)], ids=['lambda','partial'])
def test_lambda(learn, f):
    "A lambda has no name for a field"
    refused(learn, 'name of its own.*`def`', lr=1e-2, suggest_funcs=f)

def test_leading_underscore(learn):
    "A named tuple takes no field of such a name: better said before the work than after it"
    refused(learn, 'name', lr=1e-2, suggest_funcs=_hidden)

def test_result(learn):
    "One field a function, in their order, named after it, a partial after what it wraps and an object after its class; a `None` is passed through"
    def scaled(rec, k): return k*10
    def nothing(rec): return None
    res = find_bs(learn, suggest_funcs=(BSSuggestion.Critical, partial(scaled, k=4), Callable_(), nothing), show_plot=True)
    assert res._fields==('critical','scaled','Callable_','nothing') and res[1:]==(40,3,None) and res.critical==critical(learn.recorder)

@pytest.mark.parametrize('funcs', [None,()])
def test_measure_only(learn, funcs):
    "No suggestion, but the measurements"
    assert find_bs(learn, suggest_funcs=funcs) is None and len(learn.recorder.noise)==3 and learn.opt is None

# --- NaN

def broken_loss(learn, k, change):
    "From the `k`th batch on the loss is what `change` makes of it"
    n,old = [0],learn.loss_func
    def loss(*args):
        n[0] += 1
        return change(old(*args)) if n[0]>=k else old(*args)
    loss.reduction,learn.loss_func = 'mean',loss # said, so that nobody needs to try
    return n

class BadGrad(torch.autograd.Function):
    "The identity, with a gradient of `bad`"
    @staticmethod
    def forward(ctx, x, bad): ctx.bad = bad; return x.clone()
    @staticmethod
    def backward(ctx, g): return g*ctx.bad,None

accidents = dict(loss_nan=('loss', lambda l: l*math.nan), loss_inf=('loss', lambda l: l+math.inf), loss_minus_inf=('loss', lambda l: l-math.inf),
    grad_nan=('gradient', lambda l: BadGrad.apply(l, math.nan)), grad_inf=('gradient', lambda l: BadGrad.apply(l, math.inf)))

@pytest.mark.parametrize('method', ['accumulate','sequential'])
@pytest.mark.parametrize('accident', accidents)
def test_nan_mid_way(learn, accident, method):
    "Stop at once, put the weights back, keep the measurements made before, warn, and suggest from what there is"
    what,change = accidents[accident]
    if method=='sequential': what = 'loss' # which the next step ruins
    n,before,modes = broken_loss(learn, 25, change),weights(learn),[m.training for m in learn.model.modules()]
    with pytest.warns(UserWarning, match=f'The {what} became NaN or infinite between batches 21 and 30. 2 measurements .*kept.*lower learning rate') as ws:
        res = find_bs(learn, num_it=60, method=method)
    assert len(ws)==1 and n==[30] and learn.recorder.search.n_iter==[10,20]
    assert all(map(math.isfinite, learn.recorder.noise+learn.recorder.scale)) and res==(critical(learn.recorder),)
    assert same(before, weights(learn)) and learn.opt is None and [m.training for m in learn.model.modules()]==modes

@pytest.mark.parametrize('method', ['accumulate','sequential'])
def test_one_bad_batch(learn, method):
    "One such batch is enough, though the weights are still good"
    n = broken_loss(learn, 15, lambda l: l*(math.nan if n[0]==15 else 1))
    with pytest.warns(UserWarning, match='loss became NaN'): find_bs(learn, method=method)
    assert learn.recorder.search.n_iter==[10] and n==[20]

@pytest.mark.parametrize('lr', [1e20,1e30])
def test_huge_lr(learn, lr):
    "A learning rate that destroys the weights at the first step"
    before = weights(learn)
    with pytest.warns(UserWarning, match='became NaN or infinite.*lower learning rate'): find_bs(learn, lr=lr)
    assert len(learn.recorder.noise) < 3 and all(map(math.isfinite, learn.recorder.noise)) and same(before, weights(learn))

@pytest.mark.parametrize('accident', accidents)
def test_nan_in_first_window(learn, accident):
    "Nothing was measured, so nothing is suggested or drawn; the measurements of an earlier search stay"
    what,change = accidents[accident]
    find_bs(learn)
    earlier,before = learn.recorder.bs_find_stats,weights(learn)
    broken_loss(learn, 3, change)
    with pytest.warns(UserWarning, match=f'The {what} became NaN or infinite between batches 1 and 10. 0 measurements'): res = find_bs(learn, show_plot=True)
    assert res is None and not plt.get_fignums() and earlier.equals(learn.recorder.bs_find_stats) and same(before, weights(learn))

def test_nan_in_first_window_of_first_search(learn):
    "And without an earlier search there is nothing to draw, which is said"
    broken_loss(learn, 1, lambda l: l*math.nan)
    with pytest.warns(UserWarning, match='no measurement'): assert find_bs(learn) is None
    assert not len(learn.recorder.noise) and learn.recorder.bs_find_stats.empty
    with pytest.raises(ValueError, match='bs_find'): learn.recorder.plot_bs_find()

def test_works_after_nan(learn):
    "A search after one that went wrong finds the same as without it"
    expected,old = find_bs(learn),learn.loss_func
    stats = learn.recorder.bs_find_stats
    broken_loss(learn, 15, lambda l: l*math.nan)
    with pytest.warns(UserWarning): find_bs(learn)
    assert len(learn.recorder.noise)==1
    learn.loss_func = old
    assert find_bs(learn)==expected and learn.recorder.bs_find_stats.equals(stats)

def test_callback_warns_and_goes_on(learn):
    "In an ordinary training the callback only watches: it warns once, and the training is the user's to stop"
    broken_loss(learn, 8, lambda l: l*math.nan)
    with learn.no_logging(), pytest.warns(UserWarning, match='NaN or infinite') as ws: learn.fit(1, 1e-2, cbs=BSFinder(n_batch=5))
    assert len([w for w in ws if 'NaN or infinite' in str(w.message)])==1 and len(learn.recorder.losses)==22 and learn.recorder.search.n_iter==[5]

# --- drowned signal

def drowned(learn):
    "A loss whose gradient is as long in each batch, and cancels out over two"
    n,old = [0],learn.loss_func
    def loss(*args): n[0] += 1; return old(*args)*(-1)**n[0]
    learn.loss_func = loss
    return learn

@pytest.mark.parametrize('method', ['accumulate','sequential'])
def test_drowned_signal(learn, method):
    "Where noise hides the gradient the noise scale is inf, never negative, and the user hears what to do"
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64,10))
    before = weights(drowned(learn))
    with pytest.warns(UserWarning, match='drowned in noise.*inf.*Raise num_it, n_batch or bs'): res = find_bs(learn, lr=1e-6, method=method, show_plot=True)
    assert res==(None,) and learn.recorder.noise_scale==[math.inf]*3 and min(learn.recorder.noise) > 0 and max(learn.recorder.scale) <= 0
    assert plt.get_fignums() and same(before, weights(learn))

def test_never_negative(learn):
    "Random labels, small windows: estimates of either sign, a noise scale of none"
    learn.dls.loaders[0] = learn.dls.train.new([(o[0], TensorCategory(random.randrange(10))) for o in learn.dls.train.dataset])
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        res = find_bs(learn, num_it=200, n_batch=2, beta=0.)
    ns = learn.recorder.noise_scale
    assert len(ns)==100 and min(ns) >= 0 and not any(map(math.isnan, ns)) and math.isinf(learn.recorder.settled().noise_scale)==any('drowned' in str(w.message) for w in ws) and math.inf in ns
    assert res.critical is None or 1 <= res.critical <= 1437

@pytest.mark.parametrize('noise,scale,expected', [(1.,-1.,math.inf), (1.,0.,math.inf), (-1.,1.,0.), (-1.,-1.,math.inf), (0.,1.,0.), (3.,2.,1.5)])
def test_noise_scale_of_any_estimates(noise, scale, expected):
    "An unbiased estimate can be negative, the noise scale cannot"
    assert noise_scale(noise, scale)==expected

@pytest.mark.parametrize('series,expected', [([math.inf]*8,None), ([8.]*6+[math.inf,100.],128), ([8.]*6+[math.inf]*2,None), ([0.]*4,1), ([1e9]*4,1024), ([3.],4)], ids=str)
def test_suggestion_is_sensible(learn, series, expected):
    "A power of two between 1 and the training set, or None"
    rec = BSRecorder.of(learn)
    rec.keep(search=Search(n_items=1437))
    for i,o in enumerate(series): rec.search.add(i, o if math.isfinite(o) else 1., 1. if math.isfinite(o) else -1.)
    assert critical(rec)==expected

def test_no_warning_otherwise(learn):
    "A search without an accident is silent"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find_bs(learn, show_plot=True) is not None

# --- what a review found

@pytest.mark.parametrize('kwargs', [dict(n_batch=2.5), dict(num_it=40.), dict(bs=32.5), dict(num_it=math.nan)], ids=str)
def test_whole_numbers(learn, kwargs):
    "Numbers of batches and items are whole"
    refused(learn, 'must be a whole number', **kwargs)

def test_windows_larger_than_the_data(learn):
    "Batches that share examples look too much alike, and that is said"
    with pytest.warns(UserWarning, match='is more than the 1,437 of the training set.*Lower n_batch or bs'): find_bs(learn, bs=256)

def test_all_batches_alike():
    "Where every batch is the whole training set there is no noise to see, and that is said"
    x,y = torch.rand(40,3),torch.arange(40)%2
    dls = DataLoaders.from_dsets(list(zip(x,y)), list(zip(x,y)), bs=40, shuffle=True, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Linear(3,2), CrossEntropyLossFlat()).remove_cb(ProgressCallback)
    with pytest.warns(UserWarning, match='is more than the 40.*comes out too low'): assert find_bs(learn, method='accumulate').critical==1

def test_accumulation_twice(learn):
    "Two callbacks that decide when to step are one too many in a real fit; a search leaves the other one out"
    learn.add_cb(GradientAccumulation(128))
    with learn.no_logging(), pytest.raises(ValueError, match='remove one of them'): learn.fit(1, cbs=BSFinder())
    assert find_bs(learn).critical

def test_unfinished_window_leaves_no_gradient(learn):
    "A fit that ends within a window does not hand its sums to the next"
    with learn.no_logging(): learn.fit(1, cbs=BSFinder(n_batch=20))
    assert all(not p.grad.any() for p in learn.model.parameters())

class Scaler(Callback):
    "Stands for a loss scaler that overflows at first: the gradients of the first batches are infinite, the losses are not"
    order = MixedPrecision.order
    def __init__(self, n, bad=()): self.n,self.bad,self.seen = n,bad,0
    def before_fit(self): self.learn.scaler = self
    def is_enabled(self): return True
    def scale(self, o): return o*1024.
    def get_scale(self): raise AssertionError('this would wait for the device')
    def after_pred(self):
        self.seen += 1
        if self.seen in self.bad: self.learn.pred = self.learn.pred*math.nan
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*(1024. if self.seen > self.n else math.inf)
    def before_step(self):
        if self.seen <= self.n: raise CancelStepException()
        for p in self.learn.model.parameters(): p.grad.div_(1024)

def test_loss_scale(learn, tmp_path):
    "A loss scale does not show in the numbers, and windows that overflow are left out"
    find_bs(learn)
    plain = learn.recorder.bs_find_stats
    scaled = make_learner(tmp_path)
    scaled.add_cb(Scaler(0))
    find_bs(scaled)
    pd.testing.assert_frame_equal(plain, scaled.recorder.bs_find_stats, rtol=1e-3)
    overflowing = make_learner(tmp_path)
    overflowing.add_cb(Scaler(10))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        find_bs(overflowing, num_it=40)
    assert overflowing.recorder.search.n_iter == [20,30,40]

def test_nan_after_overflow(learn):
    "An overflow that the scaler answers does not silence the warning of a real NaN later"
    learn.add_cb(Scaler(10, bad=range(25,100)))
    with pytest.warns(UserWarning, match='loss became NaN or infinite between batches 21 and 30. 1 measurements'): find_bs(learn, num_it=60)
    assert learn.recorder.search.n_iter == [20]

@pytest.mark.parametrize('kwargs,match', [(dict(lr='x'), "lr must be positive and finite, got 'x'"), (dict(suggest_funcs=BSSuggestion), 'must be functions of the recorder'), (dict(suggest_funcs=3), 'must be functions of the recorder')], ids=str)
def test_other_types(learn, kwargs, match):
    "What is no number or no function is refused before the search"
    refused(learn, match, **kwargs)

def test_empty_training_set(learn):
    "A learner that was loaded for inference has no data"
    learn.dls.loaders[0] = learn.dls.train.new([])
    refused(learn, 'training set is empty.*load_learner')
