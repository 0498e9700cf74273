"The many kinds of learners: each is measured, wherever there is an exact value the measurement comes close to it, and afterwards the model is as before."
from torch.amp import autocast, GradScaler
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, CategoryBlock, DataBlock, FillMissing, Normalize, TabularDataLoaders, tabular_config, tabular_learner
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastai.vision.all import ImageBlock, MaskBlock, aug_transforms, resnet18, unet_learner, vision_learner
from conftest import *

methods = ['accumulate','split']
pieces = dict(split=4) # into how many micro-batches a method cuts a batch, if it does

pytestmark = pytest.mark.filterwarnings('ignore:The gradient drowned') # which so few batches may bring about

@pytest.fixture(params=methods)
def method(request): return request.param

# --- small learners and what to expect of them

def biased(m): m.bias.data[0] += 2; return m # far from the optimum, for a gradient that is not drowned in noise
def net(): return nn.Sequential(nn.Flatten(), biased(nn.Linear(64,10)))
def deep(): return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), biased(nn.Linear(16,10)))
def halves(m): return [params(m[:2]), params(m[2:])]
def torch_opt(opt, **kwargs): return partial(OptimWrapper, opt=opt, **kwargs)

def learner(model=net, loss=None, items=None, bs=8, n_inp=1, drop_last=True, **kwargs):
    "128 digits in 16 batches of 8"
    set_seed(0)
    items = digits()[:128] if items is None else items
    dls = DataLoaders.from_dsets(items, items[:16], bs=bs, num_workers=0, shuffle=True, drop_last=drop_last, device='cpu')
    dls.n_inp = n_inp
    kwargs = dict(path=tempfile.gettempdir(), opt_func=Adam) | kwargs
    return Learner(dls, model(), loss or CrossEntropyLossFlat(), **kwargs).remove_cb(ProgressCallback)

def contents(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

def measure(learn, method='accumulate', num_it=320, n_batch=8, lr=1e-12, **kwargs):
    "Search, by default with weights that stand still, check what holds for every search, return the last noise and scale: averages over all"
    kwargs = dict(beta=1, n_batch=n_batch) | kwargs
    n_batch = kwargs['n_batch']
    if method=='split' and lr==1e-12: num_it *= 2 # its pairs have fewer examples and scatter more
    before,opt,fs,cbs = contents(learn),learn.opt,learn.loss_func,list(learn.cbs)
    learn.bs_find(lr, num_it=num_it, method=method, show_plot=False, suggest_funcs=None, **kwargs)
    rec,after = learn.recorder,learn.model.state_dict()
    assert list(before)==list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert learn.opt is opt and learn.loss_func is fs and list(learn.cbs)==cbs and not any(p._backward_hooks for p in learn.model.parameters())
    assert len(rec.noise)==len(rec.scale)==len(rec.noise_scale)==len(rec.bs_find_stats)==num_it//n_batch and rec.search.n_iter[-1]==num_it
    assert all(map(math.isfinite, rec.noise+rec.scale)) and min(rec.noise) > 0
    return rec.noise[-1],rec.scale[-1]

def stats(learn, method='accumulate', num_it=32, **kwargs):
    measure(learn, method, num_it, **kwargs)
    return learn.recorder.bs_find_stats

def assert_same(a, b, rtol=1e-5): pd.testing.assert_frame_equal(a, b, rtol=rtol, check_exact=False)

def trainable(model): return [p for p in model.parameters() if p.requires_grad]
def flat(grads, ps): return torch.cat([torch.zeros(p.numel()) if g is None else g.detach().float().flatten() for g,p in zip(grads, ps)]).double()

def singles(learn):
    "The gradient of each training item, a row each"
    dl,ps,rows = learn.dls.train,trainable(learn.model),[]
    if not isinstance(dl, DataLoader): dl = DataLoader(dl.dataset, num_workers=0)
    for b in dl.new(bs=1, shuffle=False, drop_last=False):
        learn._split(b)
        loss = learn.loss_func(learn.model.train()(*learn.xb), *learn.yb)
        rows.append(flat(torch.autograd.grad(loss, ps, allow_unused=True), ps))
    learn._end_cleanup()
    return torch.stack(rows)

def exact(learn, weight=None, replace=False):
    "Noise and scale of the whole training set; where batches are drawn without replacement, as is usual, the scale that they see is less by noise/n"
    g = singles(learn)
    if weight is not None: # the loss is a weighted mean: by its derivative at the mean gradient
        weight = weight/weight.mean()
        mean = (weight[:,None]*g).mean(0)
        g = mean + weight[:,None]*(g-mean)
    n,mean = len(g),g.mean(0).square().sum()
    noise = g.square().sum(1).mean()-mean
    if not replace: noise,mean = noise*n/(n-1),mean-noise/(n-1)
    return noise.item(),mean.item()

class Grads(Callback):
    "The gradient of each batch of an ordinary training"
    def before_fit(self): self.all = []
    def before_step(self): self.all.append(flat([p.grad for p in trainable(self.model)], trainable(self.model)))

def by_batches(learn, epochs=30):
    "Noise and scale from the scatter of ordinary batches' gradients within an epoch, where chance plays a part in single examples too"
    grads,n,bs = Grads(),learn.dls.train.n,learn.dls.train.bs
    with learn.no_logging(): learn.fit(epochs, 1e-12, cbs=grads)
    g = torch.stack(grads.all).view(epochs, n//bs, -1)
    noise = bs*g.var(1).sum(-1).mean()
    return noise.item(),(g.mean(1).square().sum(-1).mean()-noise/n).item()

def assert_close(got, want, tol=.1):
    for nm,a,b in zip(('noise','scale'), got, want): assert abs(a/b-1) < tol, f'{nm} {a:.4g} instead of {b:.4g}: {a/b-1:+.1%}'

def assert_far(a, b, tol=.2): assert any(abs(o/p-1) > tol for o,p in zip(a, b)), f'{a} and {b} are too much alike for the test to tell'

# --- parameters

def test_plain(method):
    "What the other tests build upon: the value of the simplest learner"
    learn = learner()
    assert_close(measure(learn, method), exact(learn), .05 if method=='accumulate' else .1)

def test_frozen_layers(method):
    "Only what is trained counts"
    learn = learner(deep, splitter=halves)
    whole = exact(learn)
    learn.freeze()
    want = exact(learn)
    assert_far(want, whole)
    assert_close(measure(learn, method), want)
    assert [p.requires_grad for p in learn.model.parameters()]==[False,False,True,True]
    learn.unfreeze()
    assert_close(measure(learn, method), whole)

def test_layer_frozen_by_hand(method):
    "Likewise without fastai's doing, and where no optimizer exists yet"
    learn = learner(deep)
    learn.model[3].requires_grad_(False)
    assert_close(measure(learn, method), exact(learn))

def test_discriminative_learning_rates(method):
    "The gradients count as they are, whatever the learning rate of their group"
    learn = learner(deep, splitter=halves)
    want = exact(learn)
    assert_close(measure(learn, method, lr=slice(1e-14,1e-12)), want)
    learn.freeze()
    assert_close(measure(learn, method, lr=slice(1e-14,1e-12)), exact(learn))

class Unused(nn.Module):
    "A layer that has no part in the output"
    def __init__(self): super().__init__(); self.net,self.other = net(),nn.Linear(50,50)
    def forward(self, x): return self.net(x)

def test_unused_layer(method):
    "A parameter that never gets a gradient changes nothing, and has none afterwards"
    unused = learner(Unused)
    assert_same(stats(learner(), method), stats(unused, method))
    assert all(p.grad is None for p in unused.model.parameters())

def tokens(): return [((o[0].flatten()[i:i+6]*16).long(), TensorCategory((o[0].flatten()[i+6]*16).long())) for o in digits()[:64] for i in (10,34)]

class Tokens(nn.Module):
    "Predict the next token from the mean of those before"
    def __init__(self, tied=False, sparse=False):
        super().__init__()
        self.emb,self.head = nn.Embedding(17,8,sparse=sparse),nn.Linear(8,17)
        if tied: self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.emb(x).mean(1))

def test_tied_weights(method):
    "A weight that two layers share counts once, with the sum of both gradients"
    learn = learner(partial(Tokens, tied=True), items=tokens())
    free = learner(Tokens, items=tokens()) # the same function, each weight on its own
    free.model.load_state_dict(learn.model.state_dict())
    want = exact(learn)
    assert_far(want, exact(free), .1)
    assert_close(measure(learn, method), want, .05)

@pytest.mark.parametrize('method', ['accumulate','split','per_example','sequential'])
def test_tied_weights_in_two_groups(method):
    "Where the splitter names the shared weight twice, it still counts once"
    groups = lambda m: [params(m.emb), params(m.head)]
    assert_same(*(stats(learner(partial(Tokens, tied=True), items=tokens(), opt_func=SGD, **kw), method) for kw in ({}, dict(splitter=groups))))

def test_sparse_gradients(method):
    "Rows of an embedding that have no gradient need not be stored; the value is that of a dense gradient"
    dense,sparse = (partial(learner, partial(Tokens, sparse=o), items=tokens(), opt_func=torch_opt(torch.optim.SGD)) for o in (False,True))
    learn,kinds = sparse(),[]
    hook = learn.model.emb.weight.register_hook(lambda g: kinds.append(g.is_sparse))
    with learn.no_logging(): learn.fit(1, 1e-12)
    hook.remove()
    assert kinds==[True]*16
    assert_same(stats(dense(), method), stats(sparse(), method))
    assert_close(measure(sparse(), method), exact(dense()))

# --- inputs, targets and outputs

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(32,10),biased(nn.Linear(32,10))
    def forward(self, a, b): return self.a(a.flatten(1)) + self.b(b.flatten(1))

class TwoOutputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = biased(nn.Linear(64,10)),nn.Linear(64,2)
    def forward(self, x): return self.a(x.flatten(1)),self.b(x.flatten(1))

def test_two_inputs(method):
    learn = learner(TwoInputs, items=[(x[:,:4],x[:,4:],y) for x,y in digits()[:128]], n_inp=2)
    assert_close(measure(learn, method), exact(learn))

def two_losses(p, a, b): return F.cross_entropy(p[0], a) + .5*F.cross_entropy(p[1], b)

def test_two_targets(method):
    "Two targets, two outputs, and a loss that takes all of them"
    learn = learner(TwoOutputs, two_losses, [(x,y,y%2) for x,y in digits()[:128]])
    assert_close(measure(learn, method), exact(learn))

def test_model_that_returns_a_tuple(method):
    "The second output only regularizes, and has no target"
    learn = learner(TwoOutputs, lambda p,y: F.cross_entropy(p[0], y) + .1*p[1].square().mean())
    assert_close(measure(learn, method), exact(learn))

def test_model_that_takes_a_tuple_of_targets(method):
    "Both targets in one tuple of the item"
    learn = learner(TwoOutputs, lambda p,y: two_losses(p, *y), [(x,(y,y%2)) for x,y in digits()[:128]])
    assert_close(measure(learn, method), exact(learn))

def frozen(): learn = learner(deep, splitter=halves); learn.freeze(); return learn
singly = dict(plain=learner, frozen=frozen, unused=partial(learner, Unused), tied=lambda: learner(partial(Tokens, tied=True), items=tokens()),
    two_inputs=lambda: learner(TwoInputs, items=[(x[:,:4],x[:,4:],y) for x,y in digits()[:128]], n_inp=2),
    two_targets=lambda: learner(TwoOutputs, two_losses, [(x,y,y%2) for x,y in digits()[:128]]),
    tuple=lambda: learner(TwoOutputs, lambda p,y: F.cross_entropy(p[0], y) + .1*p[1].square().mean()))

@pytest.mark.parametrize('nm', singly)
def test_gradients_of_single_examples(nm):
    "What `torch.func` makes of all these, at the same weights"
    learn = singly[nm]()
    assert_close(measure(learn, 'per_example'), exact(learn), .05)

# --- losses

def sum_loss(p, y): return F.cross_entropy(p, y, reduction='sum')
class SumLoss(nn.Module):
    "A loss that keeps its reduction to itself"
    def forward(self, p, y): return F.cross_entropy(p, y, reduction='none').sum()
sums = dict(function=lambda: sum_loss, torch=lambda: nn.CrossEntropyLoss(reduction='sum'), fastai=lambda: CrossEntropyLossFlat(reduction='sum'),
    partial=lambda: partial(F.cross_entropy, reduction='sum'), module=SumLoss)

@pytest.mark.parametrize('n', [128,123], ids=['whole','partial'])
@pytest.mark.parametrize('nm', sums)
def test_sum_over_the_batch(nm, n, method):
    "A loss that is summed has the noise scale of the mean, also where the last batch is smaller"
    kwargs = dict(items=digits()[:n], drop_last=False)
    mean,sum_ = learner(**kwargs),learner(loss=sums[nm](), **kwargs)
    pd.testing.assert_series_equal(stats(mean, method).noise_scale, stats(sum_, method).noise_scale, rtol=1e-3)

@pytest.mark.parametrize('nm', sums)
def test_noise_and_scale_of_a_sum(nm, method):
    "Both are of the single examples' gradients, which are the same in a sum and in a mean"
    learn = learner(loss=sums[nm](), items=digits()[:123], drop_last=False)
    assert_close(measure(learn, method), exact(learn))

def test_weighted_loss(method):
    "By classes that count more than others; each batch divides by its own sum of weights"
    w = torch.linspace(.5, 2, 10)
    learn = learner(loss=CrossEntropyLossFlat(weight=w), bs=64 if method=='split' else 16) # in micro-batches of 4 those sums differ so much that the scale comes out too small
    want = exact(learn, w[tensor([int(y) for _,y in digits()[:128]])].double())
    assert_far(want, exact(learn), .1)
    assert_close(measure(learn, method, n_batch=4, num_it=480), want)

@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, FocalLossFlat, partial(LabelSmoothingCrossEntropy, .3)],
    ids=['smooth','smooth flat','focal','smoother'])
def test_other_losses(loss, method):
    learn = learner(loss=loss())
    want = exact(learn)
    assert_far(want, exact(learner()), .05)
    assert_close(measure(learn, method), want)

def test_regression(method):
    learn = learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,1)), MSELossFlat(), [(x,y.float()) for x,y in digits()[:128]])
    assert_close(measure(learn, method, num_it=640), exact(learn))

@pytest.mark.parametrize('loss,method', [(CrossEntropyLossFlat,'accumulate'), (CrossEntropyLossFlat,'split'), (LabelSmoothingCrossEntropy,'accumulate'), (LabelSmoothingCrossEntropyFlat,'accumulate')],
    ids=lambda o: getattr(o, '__name__', o))
@pytest.mark.parametrize('mix', [partial(MixUp, 5.), CutMix], ids=['MixUp','CutMix'])
def test_mixed_examples(mix, loss, method):
    "Examples that are mixed with each other anew in each batch have the noise that a training with them has"
    want = by_batches(learner(loss=loss(), cbs=mix(), bs=8//pieces.get(method, 1))) # which are mixed within what goes through the model at once
    assert_close(measure(learner(loss=loss(), cbs=mix()), method, num_it=480), want)
    assert_far(want, exact(learner(loss=loss())), .05)

@pytest.mark.parametrize('mix', [MixUp, CutMix], ids=lambda o: o.__name__)
def test_mixed_examples_with_a_sum(mix, method):
    "The loss of these callbacks is their own; it sums where the learner's sums"
    mean,sum_ = (partial(learner, loss=CrossEntropyLossFlat(reduction=o), cbs=mix(), items=digits()[:120], bs=16, drop_last=False) for o in ('mean','sum'))
    want,learn = stats(mean(), method).noise_scale,sum_()
    pd.testing.assert_series_equal(stats(learn, method).noise_scale, want, rtol=1e-3)
    assert learn.loss_func.reduction=='sum'

# --- batches

def test_last_partial_batch(method):
    "15 batches of 8 and one of 3"
    learn = learner(items=digits()[:123], drop_last=False)
    assert_close(measure(learn, method), exact(learn))

def test_windows_that_end_anywhere_in_an_epoch(method):
    "14 batches of 8 and one of 3: the small one comes at any place of a window, first too"
    learn = learner(items=digits()[:115], drop_last=False)
    assert_close(measure(learn, method, num_it=480), exact(learn))

class Sizes(DataLoader):
    "Batches of 4, 12, 4, 12, ..."
    def __len__(self): return 2*(self.n//16) if self.bs>1 else self.n
    def chunkify(self, b):
        if self.bs==1: return super().chunkify(b)
        b = list(b)
        return [b[i+a:i+c] for i in range(0, len(b), 16) for a,c in ((0,4),(4,16))]

def test_loader_with_varying_batches(method):
    learn = learner()
    learn.dls.loaders[0] = Sizes(learn.dls.train.dataset, bs=8, shuffle=True, num_workers=0, device='cpu')
    assert [len(y) for _,y in learn.dls.train]==[4,12]*8==[4,12]*(len(learn.dls.train)//2)
    assert_close(measure(learn, method), exact(learn))

class BatchSampler:
    "Orders of all indices, cut into pieces of various sizes"
    sizes = [2,14,6,10]*4
    def __len__(self): return len(self.sizes)
    def __iter__(self): return iter([o.tolist() for o in torch.randperm(128).split(self.sizes)])

def test_batch_sampler(method):
    "PyTorch's own loader, with batches as a sampler makes them"
    learn = learner()
    learn.dls = DataLoaders(*(torch.utils.data.DataLoader(digits()[:128], batch_sampler=BatchSampler()) for _ in range(2)), device='cpu')
    learn.dls._device = torch.device('cpu')
    assert [len(y) for _,y in learn.dls.train]==BatchSampler.sizes
    assert_close(measure(learn, method), exact(learn))

# --- callbacks and optimizers that come between gradient and step

def test_gradients_are_measured_before_clipping(method):
    "A clip that would leave nothing of the gradient changes no measurement"
    plain,clipped = stats(learner(), method),learner(cbs=GradientClip(1e-3))
    assert_same(plain, stats(clipped, method))
    grads = Grads()
    grads.order = GradientClip.order+1
    with clipped.no_logging(): clipped.fit(1, 1e-12, cbs=grads)
    assert max(g.norm() for g in grads.all) < 1.1e-3 # the callback is still there and clips

@pytest.mark.parametrize('opt', [partial(Adam, decouple_wd=False), Adam, SGD, torch_opt(torch.optim.SGD)], ids=['l2','adam','sgd','torch'])
def test_weight_decay_does_not_count(opt, method):
    "Neither the learner's nor the search's own, though it enters the gradient when the optimizer steps"
    plain = stats(learner(opt_func=opt), method, wd=0.)
    assert_same(plain, stats(learner(opt_func=opt), method, wd=.5))
    assert_same(plain, stats(learner(opt_func=opt, wd=.5), method))

def test_gradient_accumulation_is_left_out(method):
    "It changes no measurement, and works on in the next training: a step every 32 items"
    learn = learner(cbs=GradientAccumulation(32))
    assert_same(stats(learner(), method), stats(learn, method))
    steps = []
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=Callback(after_step=lambda self: steps.append(learn.train_iter)))
    assert len(learn._grab_cbs(GradientAccumulation))==1 and len(steps)==4

@pytest.mark.parametrize('opt', [torch_opt(torch.optim.AdamW), torch_opt(torch.optim.SGD, momentum=.9), SGD, Lamb, RMSProp],
    ids=['AdamW','SGD','fastai SGD','Lamb','RMSProp'])
def test_optimizers(opt, method):
    "The gradient is there before the optimizer: all measure the same"
    learn = learner(opt_func=opt)
    assert_same(stats(learner(), method), stats(learn, method), 1e-4)
    with learn.no_logging(): learn.fit(1, 1e-3)
    if method=='accumulate': assert_close(measure(learn, method), exact(learn)) # after training the signal is too weak for so few pairs of 2 and 8

@pytest.mark.parametrize('how', ['to_fp16','to_bf16'])
@pytest.mark.filterwarnings('ignore:.*(CUDA|cuda)')
def test_mixed_precision_without_a_gpu(how, method):
    "Where there is no GPU fastai's callback does nothing, and so changes nothing"
    if torch.cuda.is_available(): pytest.skip('is for machines without a GPU')
    learn = getattr(learner(), how)()
    assert_same(stats(learner(), method), stats(learn, method))
    assert len(learn._grab_cbs(MixedPrecision))==1 and getattr(learn, 'scaler', None) is None and not torch.is_autocast_enabled('cuda')

class CPUMixed(MixedPrecision):
    "Fastai's mixed precision, with what PyTorch has of it for the CPU"
    def before_fit(self):
        super().before_fit()
        half = self.amp_mode==AMPMode.FP16
        self.autocast,self.learn.scaler = autocast('cpu', torch.float16 if half else torch.bfloat16),\
            GradScaler('cpu', init_scale=2.**10, growth_interval=8, enabled=half)

@pytest.mark.parametrize('mode', ['fp16','bf16'])
@pytest.mark.filterwarnings('ignore:.*(CUDA|cuda)')
def test_mixed_precision_on_the_cpu(mode, method):
    "A true scaler whose scale grows in the course of the search, and gradients with rounding errors"
    learn,scale,dtypes = learner(deep, cbs=CPUMixed(amp_mode=mode)),[],set()
    hook = learn.model[1].register_forward_hook(lambda m,i,o: (dtypes.add(o.dtype), scale.append(learn.scaler.get_scale())) and None)
    got = measure(learn, method, num_it=160)
    assert dtypes=={dict(fp16=torch.float16, bf16=torch.bfloat16)[mode]} and (scale[-1] > scale[0] if mode=='fp16' else set(scale)=={1.})
    hook.remove()
    assert_close(got, exact(learn))

def test_bf16_model(method):
    "Weights and gradients of half precision: the sums of squares are taken in float32"
    items = [(x.bfloat16(),y) for x,y in digits()[:128]]
    learn = learner(lambda: net().bfloat16(), lambda p,y: F.cross_entropy(p.float(), y), items)
    assert_close(measure(learn, method), exact(learn))

def conv(): return nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU(), nn.Conv2d(4,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), biased(nn.Linear(32,10)))

@pytest.mark.parametrize('kwargs', [{}, dict(use_amp=False)], ids=['amp','plain'])
@pytest.mark.filterwarnings('ignore:.*(CUDA|cuda)')
def test_channels_last(kwargs, method):
    "The other order in memory changes the speed only; afterwards the weights lie as before, and the next training puts them in order again"
    learn = learner(conv).to_channelslast(**kwargs)
    strides,seen = [p.stride() for p in learn.model.parameters()],[]
    learn.model[0].register_forward_pre_hook(lambda m,i: seen.append(learn.model[2].weight.is_contiguous(memory_format=torch.channels_last)))
    assert_same(stats(learner(conv), method), stats(learn, method), 1e-3)
    assert seen and all(seen) and [p.stride() for p in learn.model.parameters()]==strides
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.model[2].weight.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('warm', [False,True], ids=['new','trained'])
@pytest.mark.parametrize('inplace', [False,True], ids=['wrapped','in place'])
def test_compiled_model(inplace, warm, method):
    "A compiled model, before and after its first training, measures as the plain one"
    def learner_():
        learn = learner(deep, opt_func=SGD)
        if warm:
            with learn.no_logging(): learn.fit(1, 1e-2)
        return learn
    plain = stats(learner_(), method)
    torch._dynamo.reset()
    learn = learner(deep, opt_func=SGD)
    if inplace: learn.model.compile(backend='aot_eager')
    else: learn.model = torch.compile(learn.model, backend='aot_eager')
    if warm:
        with learn.no_logging(): learn.fit(1, 1e-2)
    assert_same(plain, stats(learn, method), 1e-3)
    torch._dynamo.reset()

# --- fastai's own learners

words = 'the cat sat on a mat and the dog ran to its house'.split()

def texts():
    rng = np.random.RandomState(0)
    return pd.DataFrame(dict(text=[' '.join(rng.choice(words, rng.randint(8,20))) for _ in range(60)], label=rng.choice(['x','y'], 60)))

def by_spaces(row): return row.text.split()
def picture(i): return (np.random.RandomState(i).rand(32,32,3)*255).astype(np.uint8)
def mask(i): return (picture(i)[...,0] > 128).astype(np.uint8)
def ratings():
    rng = np.random.RandomState(0)
    return pd.DataFrame(dict(user=rng.randint(0,8,160), item=rng.randint(0,12,160), rating=rng.choice([3,4,5,5], 160).astype(np.float32)))
def table(n=160):
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rng.randn(n), b=rng.randn(n), kind=rng.choice(list('uvw'), n)))
    df['y'] = np.where(df.a+df.b+(df.kind=='u')+.5*rng.randn(n) > 0, 'yes', 'no')
    df.loc[::7,'b'] = np.nan
    return df

def blocks(items, *bs, loader={}, **kwargs):
    return DataBlock(bs, splitter=RandomSplitter(.2, seed=0), **kwargs).dataloaders(items, num_workers=0, device='cpu', **dict(bs=8)|loader)

def language_model(path):
    dls = blocks(texts(), TextBlock([], is_lm=True, seq_len=5, min_freq=1), get_x=by_spaces, loader=dict(seq_len=5))
    return language_model_learner(dls, AWD_LSTM, config=awd_lstm_lm_config|dict(emb_sz=8, n_hid=12, n_layers=2),
        pretrained=False, metrics=accuracy, path=path)

def text_classifier(path):
    dls = blocks(texts(), TextBlock([], min_freq=1), CategoryBlock, get_x=by_spaces, get_y=ColReader('label'))
    return text_classifier_learner(dls, AWD_LSTM, config=awd_lstm_clas_config|dict(emb_sz=8, n_hid=12, n_layers=2),
        pretrained=False, metrics=accuracy, path=path)

def tabular(path, **kwargs):
    dls = TabularDataLoaders.from_df(table(), path, procs=[Categorify,FillMissing,Normalize], cat_names=['kind'], cont_names=['a','b'], y_names='y',
        y_block=CategoryBlock(), valid_idx=range(128,160), bs=8, device='cpu')
    return tabular_learner(dls, layers=[8], metrics=accuracy, path=path, **kwargs)

def collab(path, **kwargs):
    dls = CollabDataLoaders.from_df(ratings(), valid_pct=.2, seed=0, bs=8, device='cpu', path=path)
    return collab_learner(dls, n_factors=4, y_range=(.5,5.5), path=path, **kwargs)

def vision(path):
    dls = blocks(range(30), ImageBlock, CategoryBlock, get_x=picture, get_y=lambda i: i%3, batch_tfms=aug_transforms(size=32))
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=path)

def tiny(pretrained=False):
    return nn.Sequential(ConvLayer(3,8,stride=2), ConvLayer(8,16,stride=2), ConvLayer(16,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,2))

def unet(path):
    dls = blocks(range(10), ImageBlock, MaskBlock(codes=['no','yes']), get_x=picture, get_y=mask, loader=dict(bs=4))
    return unet_learner(dls, tiny, pretrained=False, n_out=2, path=path)

def custom(path):
    "A DataBlock of rows that are turned into tensors, and a model of one's own with batch norm and dropout"
    dls = blocks(table(), TransformBlock, CategoryBlock, get_x=lambda o: tensor([o.a,o.a**2]).float(), get_y=ColReader('y'))
    return Learner(dls, nn.Sequential(nn.Linear(2,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.5), nn.Linear(8,2)), metrics=accuracy, path=path)

@pytest.mark.parametrize('make', [language_model, text_classifier, tabular, collab, vision, unet, custom], ids=lambda o: o.__name__)
def test_fastai_learners(make, tmp_path, method):
    "They measure, at a learning rate that moves the weights, and the model, running statistics included, is as before; and they train"
    set_seed(0)
    learn = make(tmp_path).remove_cb(ProgressCallback)
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)
    assert ('tokens' in learn.recorder.bs_find_stats)==(make is language_model) # where each token has a prediction
    before = contents(learn)
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert any(not torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert len(learn.recorder.values)==1 and len(learn.recorder.noise)==2
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)

def test_weights_move_in_the_search(tmp_path, method):
    "What the test above is worth: within the search the weights do move, and running statistics as well"
    learn = custom(tmp_path).remove_cb(ProgressCallback)
    seen = []
    learn.model[0].register_forward_hook(lambda m,*_: seen.append((m.weight.detach().clone(), learn.model[1].running_mean.clone())))
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)
    assert not any(map(torch.equal, seen[0], seen[-1]))

def test_collaborative_filtering(tmp_path, method):
    "Embeddings of which a batch touches few rows: the value. Fastai draws rows of tables with replacement"
    set_seed(0)
    learn = collab(tmp_path).remove_cb(ProgressCallback)
    assert_close(measure(learn, method, num_it=640), exact(learn, replace=True))

def test_tabular_model(tmp_path, method):
    "Categories and numbers are two inputs; without batch norm, each row has a gradient of its own: the value"
    set_seed(0)
    learn = tabular(tmp_path, config=tabular_config(use_bn=False, bn_cont=False)).remove_cb(ProgressCallback)
    assert_close(measure(learn, method, num_it=640), exact(learn, replace=True), .15)

def test_vision_learner_frozen(tmp_path, method):
    "Frozen but for the head: only the head and the batch norms, which fastai always trains, count and have gradients"
    learn = vision(tmp_path).remove_cb(ProgressCallback)
    learn.freeze()
    seen = set()
    learn.add_cb(Callback(before_step=lambda self: seen.update(nm for nm,p in learn.model.named_parameters() if p.grad is not None)))
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)
    norms = {f'{nm}.{o}' for nm,m in learn.model[0].named_modules(prefix='0') if isinstance(m, nn.BatchNorm2d) for o in ('weight','bias')}
    assert len(norms)==40 and seen==norms | {nm for nm,_ in learn.model[1].named_parameters(prefix='1')}
    assert all(p.grad is None for p in learn.model.parameters())

# --- callbacks that write or stop

def disk(path): return {o: (o.stat().st_mtime_ns, o.read_bytes() if o.is_file() else None) for o in sorted(Path(path).rglob('*'))}

def saved(learn): return (learn.path/'models'/'model.pth').exists()
def saved_each(learn): return [o.name for o in sorted((learn.path/'models').iterdir())]==[f'each_{i}.pth' for i in range(4)]
def stopped(learn): return len(learn.recorder.values)==2
def reduced(learn): return abs(learn.opt.hypers[-1]['lr']/1e-5-1) < 1e-6
def logged(learn): return list(learn.csv_logger.read_log().epoch)==[0,1,2,3] and learn.logger is print

hopeless = dict(min_delta=1e6, patience=1) # no epoch after the first is an improvement
trackers = dict(save=(SaveModelCallback, saved),
    save_each=(partial(SaveModelCallback, every_epoch=True, fname='each'), saved_each),
    stop=(partial(EarlyStoppingCallback, **hopeless), stopped), reduce=(partial(ReduceLROnPlateau, **hopeless), reduced), csv=(CSVLogger, logged))

@pytest.mark.parametrize('first', ['search','fit'])
@pytest.mark.parametrize('nm', trackers)
def test_callbacks_that_write_or_stop(nm, first, tmp_path, method, capsys):
    "In the search, of several epochs, they write nothing, stop nothing and change no learning rate, and measure as without them; in a training they do"
    cb,done = trackers[nm]
    learn = learner(path=tmp_path, cbs=cb())
    learn.logger = print
    if first=='fit': learn.fit(4, 1e-2)
    before,hypers = disk(tmp_path),deepcopy(list(learn.opt.hypers)) if learn.opt else None
    capsys.readouterr()
    got = stats(learn, method, num_it=64)
    assert not capsys.readouterr().out and disk(tmp_path)==before and (list(learn.opt.hypers) if learn.opt else None)==hypers
    if first=='search': assert_same(stats(learner(), method, num_it=64), got)
    learn.fit(4, 1e-2)
    assert done(learn)

@pytest.mark.parametrize('derived', [False,True])
@pytest.mark.parametrize('module', ['wandb','tensorboard'])
def test_logging_services(module, derived, tmp_path, method):
    "Stand-ins for callbacks that report to a service: they take part in batches, but do not report a search"
    def report(self): (tmp_path/'log').open('a').write('.')
    events = dict.fromkeys(('before_fit','before_batch','after_pred','after_batch','after_epoch','after_fit'), report)
    cls = type('Logger', (Callback,), events | dict(__module__=f'fastai.callback.{module}'))
    if derived: cls = type('Mine', (cls,), dict(__module__='mine'))
    learn = learner(path=tmp_path, cbs=cls())
    got = stats(learn, method)
    assert not list(tmp_path.iterdir())
    assert_same(stats(learner(), method), got)
    with learn.no_logging(): learn.fit(1, 1e-12)
    assert (tmp_path/'log').stat().st_size==1+16*3+2*3+1+1

def test_real_logging_services(tmp_path, method):
    "And the true one, where it is installed"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = learner(path=tmp_path, cbs=TensorBoardCallback(tmp_path/'runs', trace_model=False, log_preds=False))
    stats(learn, method)
    assert not (tmp_path/'runs').exists()
    with learn.no_logging(): learn.fit(1, 1e-12)
    assert list((tmp_path/'runs').iterdir())
