"Models of every kind: each is measured, comes close to the exact value wherever there is one, and is as before."
from functools import partial

import numpy as np, pandas as pd, pytest, torch
import fastai.vision.all # its transforms know how to make tensors of arrays
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.collab import collab_learner, CollabDataLoaders
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import ColReader, Normalize, RandomSplitter
from fastai.layers import ConvLayer
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.tabular.core import Categorify, FillMissing
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.tabular.model import tabular_config
from fastai.text.data import TextBlock
from fastai.text.learner import language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.torch_core import params, set_seed, TensorCategory
from fastai.vision.augment import aug_transforms
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import unet_learner, vision_learner
from torch import nn, tensor
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torch.amp import autocast, GradScaler
from torch.nn import functional as F
from helpers import digits, small_table, weights
from measuring import (
    assert_close, assert_far, assert_same, biased, by_batches, deep, drowned_is_fine, each_method, each_method_in_ci, enough,
    exact, halves, learner, measure, net, stats, torch_opt)

pytestmark = drowned_is_fine

# --- parameters

@each_method
def test_plain(method):
    "What the other tests build upon: the value of the simplest learner"
    learn = learner()
    assert_close(measure(learn, method), exact(learn), .05 if method=='accumulate' else .1)

@each_method_in_ci
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

@each_method_in_ci
def test_layer_frozen_by_hand(method):
    "Likewise without fastai's doing, and where no optimizer exists yet"
    learn = learner(deep)
    learn.model[3].requires_grad_(False)
    assert_close(measure(learn, method), exact(learn))

@each_method_in_ci
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

@each_method
def test_unused_layer(method):
    "A parameter that never gets a gradient changes nothing, and has none afterwards"
    unused = learner(Unused)
    assert_same(stats(learner(), method), stats(unused, method))
    assert all(p.grad is None for p in unused.model.parameters())

def tokens():
    "Two rows of six pixels from each of 64 images, and the pixel that follows"
    pixels = [(x.flatten()*16).long() for x,_ in digits()[:64]]
    return [(o[i:i+6], TensorCategory(o[i+6])) for o in pixels for i in (10,34)]

class Tokens(nn.Module):
    "Predict the next token from the mean of those before"
    def __init__(self, tied=False, sparse=False):
        super().__init__()
        self.emb,self.head = nn.Embedding(17,8,sparse=sparse),nn.Linear(8,17)
        if tied: self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.emb(x).mean(1))

@each_method_in_ci
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
    def groups(m): return [params(m.emb), params(m.head)]
    make = partial(learner, partial(Tokens, tied=True), items=tokens(), opt_func=SGD)
    assert_same(stats(make(), method), stats(make(splitter=groups), method))

@each_method_in_ci
def test_sparse_gradients(method):
    "Rows of an embedding that have no gradient need not be stored; the value is that of a dense gradient"
    def make(sparse): return learner(partial(Tokens, sparse=sparse), items=tokens(), opt_func=torch_opt(torch.optim.SGD))
    learn,kinds = make(sparse=True),[]
    hook = learn.model.emb.weight.register_hook(lambda g: kinds.append(g.is_sparse))
    with learn.no_logging(): learn.fit(1, 1e-12)
    hook.remove()
    assert kinds==[True]*16
    assert_same(stats(make(sparse=False), method), stats(make(sparse=True), method))
    assert_close(measure(make(sparse=True), method), exact(make(sparse=False)))

# --- inputs, targets and outputs

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(32,10),biased(nn.Linear(32,10))
    def forward(self, a, b): return self.a(a.flatten(1)) + self.b(b.flatten(1))

class TwoOutputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = biased(nn.Linear(64,10)),nn.Linear(64,2)
    def forward(self, x): return self.a(x.flatten(1)),self.b(x.flatten(1))

@each_method_in_ci
def test_two_inputs(method):
    learn = learner(TwoInputs, items=[(x[:,:4],x[:,4:],y) for x,y in digits()[:128]], n_inp=2)
    assert_close(measure(learn, method), exact(learn))

def two_losses(p, a, b): return F.cross_entropy(p[0], a) + .5*F.cross_entropy(p[1], b)

@each_method_in_ci
def test_two_targets(method):
    "Two targets, two outputs, and a loss that takes all of them"
    learn = learner(TwoOutputs, two_losses, [(x,y,y%2) for x,y in digits()[:128]])
    assert_close(measure(learn, method), exact(learn))

@each_method_in_ci
def test_model_that_returns_a_tuple(method):
    "The second output only regularizes, and has no target"
    learn = learner(TwoOutputs, lambda p,y: F.cross_entropy(p[0], y) + .1*p[1].square().mean())
    assert_close(measure(learn, method), exact(learn))

@each_method_in_ci
def test_model_that_takes_a_tuple_of_targets(method):
    "Both targets in one tuple of the item"
    learn = learner(TwoOutputs, lambda p,y: two_losses(p, *y), [(x,(y,y%2)) for x,y in digits()[:128]])
    assert_close(measure(learn, method), exact(learn))

def frozen():
    learn = learner(deep, splitter=halves)
    learn.freeze()
    return learn

singly = dict(plain=learner, frozen=frozen, unused=partial(learner, Unused),
    tied=lambda: learner(partial(Tokens, tied=True), items=tokens()),
    two_inputs=lambda: learner(TwoInputs, items=[(x[:,:4],x[:,4:],y) for x,y in digits()[:128]], n_inp=2),
    two_targets=lambda: learner(TwoOutputs, two_losses, [(x,y,y%2) for x,y in digits()[:128]]),
    tuple=lambda: learner(TwoOutputs, lambda p,y: F.cross_entropy(p[0], y) + .1*p[1].square().mean()))

@pytest.mark.parametrize('nm', singly)
def test_gradients_of_single_examples(nm):
    "What `torch.func` makes of all these, at the same weights"
    learn = singly[nm]()
    assert_close(measure(learn, 'per_example'), exact(learn), .05)

# --- precision and layout

@pytest.mark.parametrize('how', ['to_fp16','to_bf16'])
@pytest.mark.filterwarnings('ignore:.*(CUDA|cuda)')
@each_method
def test_mixed_precision_without_a_gpu(how, method):
    "Where there is no GPU fastai's callback does nothing, and so changes nothing"
    if torch.cuda.is_available(): pytest.skip('is for machines without a GPU')
    learn = getattr(learner(), how)()
    assert_same(stats(learner(), method), stats(learn, method))
    assert len(learn._grab_cbs(MixedPrecision))==1 and getattr(learn, 'scaler', None) is None
    assert not torch.is_autocast_enabled('cuda')

class CPUMixed(MixedPrecision):
    "Fastai's mixed precision, with what PyTorch has of it for the CPU"
    def before_fit(self):
        super().before_fit()
        half = self.amp_mode==AMPMode.FP16
        self.autocast,self.learn.scaler = autocast('cpu', torch.float16 if half else torch.bfloat16),\
            GradScaler('cpu', init_scale=2.**10, growth_interval=8, enabled=half)

@pytest.mark.parametrize('mode', ['fp16','bf16'])
@pytest.mark.filterwarnings('ignore:.*(CUDA|cuda)')
@each_method
def test_mixed_precision_on_the_cpu(mode, method):
    "A true scaler whose scale grows in the course of the search, and gradients with rounding errors"
    learn,scale,dtypes = learner(deep, cbs=CPUMixed(amp_mode=mode)),[],set()
    def look(m, i, o):
        dtypes.add(o.dtype)
        scale.append(learn.scaler.get_scale())
    hook = learn.model[1].register_forward_hook(look)
    got = measure(learn, method, num_it=160)
    assert dtypes=={dict(fp16=torch.float16, bf16=torch.bfloat16)[mode]}
    assert scale[-1] > scale[0] if mode=='fp16' else set(scale)=={1.}
    hook.remove()
    assert_close(got, exact(learn))

@each_method_in_ci
def test_bf16_model(method):
    "Weights and gradients of half precision: the sums of squares are taken in float32"
    items = [(x.bfloat16(),y) for x,y in digits()[:128]]
    learn = learner(lambda: net().bfloat16(), lambda p,y: F.cross_entropy(p.float(), y), items)
    assert_close(measure(learn, method), exact(learn))

def conv():
    return nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU(), nn.Conv2d(4,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), biased(nn.Linear(32,10)))

@pytest.mark.parametrize('kwargs', [{}, dict(use_amp=False)], ids=['amp','plain'])
@pytest.mark.filterwarnings('ignore:.*(CUDA|cuda)')
@each_method
def test_channels_last(kwargs, method):
    "The other order in memory changes only the speed; afterwards the weights lie as before, until the next training"
    learn = learner(conv).to_channelslast(**kwargs)
    strides,seen,weight = [p.stride() for p in learn.model.parameters()],[],learn.model[2].weight
    learn.model[0].register_forward_pre_hook(lambda m,i: seen.append(weight.is_contiguous(memory_format=torch.channels_last)))
    assert_same(stats(learner(conv), method), stats(learn, method), 1e-3)
    assert seen and all(seen) and [p.stride() for p in learn.model.parameters()]==strides
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.model[2].weight.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('warm', [False,True], ids=['new','trained'])
@pytest.mark.parametrize('inplace', [False,True], ids=['wrapped','in place'])
@each_method
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
    text = [' '.join(rng.choice(words, rng.randint(8,20))) for _ in range(60)]
    return pd.DataFrame(dict(text=text, label=rng.choice(['x','y'], 60)))

def by_spaces(row): return row.text.split()

def picture(i): return (np.random.RandomState(i).rand(32,32,3)*255).astype(np.uint8)

def mask(i): return (picture(i)[...,0] > 128).astype(np.uint8)

def ratings():
    rng = np.random.RandomState(0)
    user,item = rng.randint(0,8,160),rng.randint(0,12,160)
    return pd.DataFrame(dict(user=user, item=item, rating=rng.choice([3,4,5,5], 160).astype(np.float32)))

def blocks(items, *bs, loader={}, **kwargs):
    block = DataBlock(bs, splitter=RandomSplitter(.2, seed=0), **kwargs)
    return block.dataloaders(items, num_workers=0, device='cpu', **dict(bs=8)|loader)

def language_model(path):
    dls = blocks(texts(), TextBlock([], is_lm=True, seq_len=5, min_freq=1), get_x=by_spaces, loader=dict(seq_len=5))
    return language_model_learner(dls, AWD_LSTM, config=awd_lstm_lm_config|dict(emb_sz=8, n_hid=12, n_layers=2),
        pretrained=False, metrics=accuracy, path=path)

def text_classifier(path):
    dls = blocks(texts(), TextBlock([], min_freq=1), CategoryBlock, get_x=by_spaces, get_y=ColReader('label'))
    return text_classifier_learner(dls, AWD_LSTM, config=awd_lstm_clas_config|dict(emb_sz=8, n_hid=12, n_layers=2),
        pretrained=False, metrics=accuracy, path=path)

def tabular(path, **kwargs):
    dls = TabularDataLoaders.from_df(
        small_table(), path, procs=[Categorify,FillMissing,Normalize], cat_names=['kind'], cont_names=['a','b'], y_names='y',
        y_block=CategoryBlock(), valid_idx=range(128,160), bs=8, device='cpu')
    return tabular_learner(dls, layers=[8], metrics=accuracy, path=path, **kwargs)

def collab(path, **kwargs):
    dls = CollabDataLoaders.from_df(ratings(), valid_pct=.2, seed=0, bs=8, device='cpu', path=path)
    return collab_learner(dls, n_factors=4, y_range=(.5,5.5), path=path, **kwargs)

def vision(path):
    dls = blocks(range(30), ImageBlock, CategoryBlock, get_x=picture, get_y=lambda i: i%3, batch_tfms=aug_transforms(size=32))
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=path)

def tiny(pretrained=False):
    convs = ConvLayer(3,8,stride=2), ConvLayer(8,16,stride=2), ConvLayer(16,16)
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,2))

def unet(path):
    dls = blocks(range(10), ImageBlock, MaskBlock(codes=['no','yes']), get_x=picture, get_y=mask, loader=dict(bs=4))
    return unet_learner(dls, tiny, pretrained=False, n_out=2, path=path)

def custom(path):
    "A DataBlock of rows that are turned into tensors, and a model of one's own with batch norm and dropout"
    dls = blocks(small_table(), TransformBlock, CategoryBlock, get_x=lambda o: tensor([o.a,o.a**2]).float(), get_y=ColReader('y'))
    model = nn.Sequential(nn.Linear(2,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.5), nn.Linear(8,2))
    return Learner(dls, model, metrics=accuracy, path=path)

makers = [language_model, text_classifier, tabular, collab, vision, unet, custom]

@pytest.mark.parametrize('make', makers, ids=lambda o: o.__name__)
@each_method
def test_fastai_learners(make, tmp_path, method):
    "They measure, at a learning rate that moves the weights; the model, running statistics included, is as before; they train"
    set_seed(0)
    learn = make(tmp_path).remove_cb(ProgressCallback)
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)
    assert ('tokens' in learn.recorder.bs_find_stats)==(make is language_model) # where each token has a prediction
    before = weights(learn)
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert any(not torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert len(learn.recorder.values)==1 and len(learn.recorder.noise)==2
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)

@each_method
def test_weights_move_in_the_search(tmp_path, method):
    "What the test above is worth: within the search the weights do move, and running statistics as well"
    learn = custom(tmp_path).remove_cb(ProgressCallback)
    seen = []
    def look(m, *_): seen.append((m.weight.detach().clone(), learn.model[1].running_mean.clone()))
    learn.model[0].register_forward_hook(look)
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)
    assert not any(map(torch.equal, seen[0], seen[-1]))

@pytest.mark.slow
@each_method
def test_collaborative_filtering(tmp_path, method):
    "Embeddings of which a batch touches few rows: the value. Fastai draws rows of tables with replacement"
    set_seed(0)
    learn = collab(tmp_path).remove_cb(ProgressCallback)
    assert_close(measure(learn, method, num_it=enough(method, 640)), exact(learn, replace=True))

@pytest.mark.slow
@each_method
def test_tabular_model(tmp_path, method):
    "Categories and numbers are two inputs; without batch norm, each row has a gradient of its own: the value"
    set_seed(0)
    learn = tabular(tmp_path, config=tabular_config(use_bn=False, bn_cont=False)).remove_cb(ProgressCallback)
    assert_close(measure(learn, method, num_it=enough(method, 640)), exact(learn, replace=True), .15)

@each_method
def test_vision_learner_frozen(tmp_path, method):
    "Frozen but for the head: only the head and the batch norms, which fastai always trains, count and have gradients"
    learn = vision(tmp_path).remove_cb(ProgressCallback)
    learn.freeze()
    seen = set()
    def look(self): seen.update(nm for nm,p in learn.model.named_parameters() if p.grad is not None)
    learn.add_cb(Callback(before_step=look))
    measure(learn, method, lr=1e-3, num_it=6, n_batch=3)
    norms = [nm for nm,m in learn.model[0].named_modules(prefix='0') if isinstance(m, nn.BatchNorm2d)]
    norms = {f'{nm}.{o}' for nm in norms for o in ('weight','bias')}
    assert len(norms)==40 and seen==norms | {nm for nm,_ in learn.model[1].named_parameters(prefix='1')}
    assert all(p.grad is None for p in learn.model.parameters())

# --- several backward passes through a parameter in one batch

class TwoPasses(Learner):
    "An auxiliary loss with a backward pass of its own"
    def _backward(self):
        self.loss_grad.backward(retain_graph=True)
        (.5*self.pred.square().mean()).backward()

class Checkpointed(nn.Module):
    "A block that is used twice, and computed again on the way back"
    def __init__(self, reentrant):
        super().__init__()
        self.first,self.block,self.last,self.reentrant = nn.Linear(64,16),nn.Linear(16,16),biased(nn.Linear(16,10)),reentrant
    def forward(self, x):
        x = self.first(x.flatten(1))
        for _ in range(2): x = checkpoint(lambda o: self.block(o).tanh(), x, use_reentrant=self.reentrant)
        return self.last(x)

def with_auxiliary(): return learner(loss=lambda p, y: F.cross_entropy(p, y) + .5*p.square().mean())

def two_passes():
    learn = learner()
    learn.__class__ = TwoPasses
    return learn

@pytest.mark.parametrize('method', ['accumulate','split','sequential'])
def test_two_backward_passes(method):
    "The noise of the whole gradient, which is that of the sum of both losses"
    if method=='sequential': return assert_same(stats(with_auxiliary(), method), stats(two_passes(), method), 1e-3)
    assert_close(measure(two_passes(), method), exact(with_auxiliary()))

class Penalty:
    "Asks for the gradient on its way to the loss"
    def __init__(self): self.ps = None
    def __call__(self, pred, y):
        loss = F.cross_entropy(pred, y)
        if not loss.requires_grad: return loss
        gs = torch.autograd.grad(loss, self.ps, create_graph=True)
        return loss + .05*sum(g.square().sum() for g in gs)

def penalised():
    learn = learner(loss=Penalty())
    learn.loss_func.ps = list(learn.model.parameters())
    return learn

@pytest.mark.parametrize('method', ['accumulate','sequential'])
def test_a_loss_that_asks_for_gradients(method):
    "What the hooks see on the way is no gradient of the batch"
    assert_close(measure(penalised(), method), by_batches(penalised()), .15)

class OwnLoss(nn.Module):
    "A model that computes its loss itself, as those of transformers do"
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x, y): return dict(loss=F.cross_entropy(self.net(x), y))

def of_pred(pred, y): return pred['loss']

def own_loss(n_inp=2):
    learn = learner(OwnLoss, of_pred, n_inp=2)
    learn.dls.loaders[0] = learn.dls.train.new(create_batch=lambda b: (lambda x, y: (x,y,y))(*map(torch.stack, zip(*b))))
    learn.dls.train._n_inp = learn.dls.n_inp = 2
    return learn

def test_a_model_with_a_loss_of_its_own(recwarn):
    "That can't be tried on parts of a batch, so 'auto' does not cut; and no warning says that it is neither a mean nor a sum"
    learn = own_loss()
    learn.bs_find(1e-12, num_it=640, n_batch=12, beta=1, show_plot=False, suggest_funcs=None)
    said = ' '.join(str(o.message) for o in recwarn)
    assert 'duplicating' not in said and "goes on with method='accumulate'" in said
    assert_close((learn.recorder.noise[-1],learn.recorder.scale[-1]), exact(learner()), .2)

def test_per_example_and_a_backward_pass_of_ones_own():
    with pytest.raises(ValueError, match="may start from another loss. Use method='accumulate'"):
        two_passes().bs_find(1e-12, method='per_example', show_plot=False)

@pytest.mark.parametrize('reentrant,method', [(True,'accumulate'), (False,'split')])
def test_shared_block_under_checkpointing(reentrant, method):
    "A block that is used twice has several backward passes of its own; the window in which that is noticed does not count"
    learn = learner(partial(Checkpointed, reentrant))
    n = enough(method, 640)
    learn.bs_find(1e-12, method=method, num_it=n, n_batch=8, beta=1, show_plot=False, suggest_funcs=None)
    assert len(learn.recorder.noise) >= n//8-1
    assert_close((learn.recorder.noise[-1],learn.recorder.scale[-1]), exact(learner(partial(Checkpointed, False))))
