"Batches of every size and of every form: short ones, varying ones, samplers; dictionaries, names, graphs, sequences."
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn, tensor
from torch.nn import functional as F
from helpers import Stream, digits
from measuring import assert_close, drowned_is_fine, each_method, each_method_in_ci, exact, learner, measure, net

pytestmark = drowned_is_fine

@each_method_in_ci
def test_last_partial_batch(method):
    "15 batches of 8 and one of 3"
    learn = learner(items=digits()[:123], drop_last=False)
    assert_close(measure(learn, method, num_it=640), exact(learn))

@each_method_in_ci
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

@each_method_in_ci
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

@each_method_in_ci
def test_batch_sampler(method):
    "PyTorch's own loader, with batches as a sampler makes them"
    learn = learner()
    dl = torch.utils.data.DataLoader(digits()[:128], batch_sampler=BatchSampler())
    learn.dls = DataLoaders(dl, dl, device='cpu')
    learn.dls._device = torch.device('cpu')
    assert [len(y) for _,y in learn.dls.train]==BatchSampler.sizes
    assert_close(measure(learn, method), exact(learn))

# --- batches whose number of items doesn't show in their tensors

def labels(): return [int(y) for _,y in digits()[:128]]

def images(b): return torch.stack([x for x,_ in b])

def boxes(b):
    "A dictionary per image, with as many boxes as it happens to have, the first none at all"
    return images(b),[dict(boxes=torch.zeros(int(y)%4, 4), label=y) for _,y in b]

def of_boxes(pred, targets): return F.cross_entropy(pred, torch.stack([tensor(int(o['label'])) for o in targets]))

def named(b): return images(b),[f'picture {int(y)}' for _,y in b],torch.stack([tensor(int(y)) for _,y in b])

def of_named(pred, names, y): return F.cross_entropy(pred, y)

def nothing_first(b): return images(b),None,torch.stack([tensor(int(y)) for _,y in b])

def graphs(b):
    "Nodes of all graphs in one tensor, and the graph of each; every node has a target"
    sizes = tensor([1+int(y) for _,y in b])
    nodes = torch.cat([x.view(1,64).repeat(n,1) for (x,_),n in zip(b, sizes)])
    return nodes,torch.repeat_interleave(torch.arange(len(b)), sizes),torch.cat([tensor([int(y)]*n) for (_,y),n in zip(b, sizes)])

class OfNodes(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x, graph): return self.net(x),graph

def of_graphs(pred, y):
    "The mean over graphs of the mean over their nodes"
    pred,graph = pred
    n = torch.bincount(graph)
    return (F.cross_entropy(pred, y, reduction='none')/n[graph]).sum()/len(n)

def time_major(b):
    "Seven steps of eight numbers each"
    return images(b).view(len(b),8,8).transpose(0,1)[:7].contiguous(),torch.stack([tensor([int(y)]*7) for _,y in b]).T

class OverTime(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(8,10)
    def forward(self, x): return self.lin(x)

def of_time(pred, y): return F.cross_entropy(pred.flatten(0,1), y.flatten())

forms = dict(boxes=(boxes, net, of_boxes, 1), names=(named, net, of_named, 1), none=(nothing_first, net, of_named, 1),
             graphs=(graphs, OfNodes, of_graphs, 2), time=(time_major, OverTime, of_time, 1))

def of_form(nm, torch_loader=False, **kwargs):
    create,model,loss,n_inp = forms[nm]
    learn = learner(model, loss, n_inp=n_inp, **kwargs)
    options = dict(num_workers=kwargs.pop('workers', 0), shuffle=True, drop_last=kwargs.get('drop_last', True))
    ds,bs = learn.dls.train.dataset,learn.dls.train.bs
    if torch_loader: learn.dls.loaders[0] = torch.utils.data.DataLoader(ds, bs, collate_fn=create, **options)
    else: learn.dls.loaders[0] = DataLoader(ds, bs, create_batch=create, device='cpu', **options)
    learn.dls.n_inp = learn.dls.loaders[0].n_inp = n_inp
    return learn

def exactly(learn):
    "What the gradients of single items give, whatever loader makes them"
    dl = learn.dls.train
    create = dl.create_batch if isinstance(dl, DataLoader) else dl.collate_fn
    loader = DataLoader(dl.dataset, 8, create_batch=create, num_workers=0, shuffle=True)
    loader.n_inp,learn.dls.loaders[0] = learn.dls.n_inp,loader
    return exact(learn)

@pytest.mark.parametrize('nm', forms)
def test_items_are_counted_by_the_loader(nm):
    "Whatever a batch looks like"
    learn = of_form(nm)
    assert_close(measure(learn, num_it=640), exactly(learn), .15)

@pytest.mark.parametrize('nm', forms)
def test_loader_of_pytorch_counts_too(nm):
    learn = of_form(nm, torch_loader=True, drop_last=False, items=digits()[:123])
    assert_close(measure(learn, num_it=640), exactly(learn), .15)

@pytest.mark.parametrize('workers', [0,2])
def test_short_last_batch_of_graphs(workers):
    "15 batches of 8 and one of 3, in worker processes too"
    learn = of_form('graphs', items=digits()[:123], drop_last=False)
    learn.dls.train.fake_l.num_workers = workers
    assert_close(measure(learn, num_it=480), exactly(learn), .15)

@pytest.mark.parametrize('nm', ['boxes','names','none'])
def test_such_batches_are_cut_between_their_items(nm):
    learn = of_form(nm)
    assert_close(measure(learn, 'split'), exactly(learn), .15)

@pytest.mark.parametrize('nm', ['graphs','time'])
def test_such_batches_are_not_cut(nm):
    "Refused where asked for; by itself 'auto' goes on with whole batches, even on data this small"
    with pytest.raises(ValueError, match="first dimensions .* for 8 items. Use method='accumulate'"):
        of_form(nm).bs_find(1e-12, method='split', num_it=40, show_plot=False)
    learn = of_form(nm)
    with pytest.warns(UserWarning, match="goes on with method='accumulate'"):
        learn.bs_find(1e-12, num_it=640, n_batch=12, beta=1, show_plot=False, suggest_funcs=None)
    assert_close((learn.recorder.noise[-1],learn.recorder.scale[-1]), exactly(learn), .2)

@pytest.mark.parametrize('nm', ['graphs','time'])
def test_batches_of_one(nm):
    "One graph is one item, whatever rows it has, and it is said"
    learn = of_form(nm, bs=1)
    with pytest.warns(UserWarning, match='a batch has one item, and its tensors have . rows each. It counts as one item'):
        got = measure(learn, num_it=1280)
    assert learn.recorder.search.train_bs==1
    assert abs(got[0]/exactly(learn)[0]-1) < .2 # the signal is far below the noise of a single item

class Counted(Stream):
    "A stream that knows how many items it has"
    def __len__(self): return len(self.items)
    def __iter__(self): return (self.items[i] for i in torch.randperm(len(self.items)).tolist())

@each_method_in_ci
def test_stream_with_a_length(method):
    "Its sampler yields as many places as a full batch has, also for the last one of 3"
    learn = learner(items=digits()[:123])
    dl = torch.utils.data.DataLoader(Counted(digits()[:123]), 8)
    learn.dls = DataLoaders(dl, dl, device='cpu')
    learn.dls._device = torch.device('cpu')
    assert_close(measure(learn, method, num_it=480), exact(learner(items=digits()[:123])), .15)

def test_batch_sampler_of_generators():
    "As PyTorch takes them"
    class Generators(BatchSampler):
        def __iter__(self): return ((i for i in o) for o in super().__iter__())
    learn = learner()
    dl = torch.utils.data.DataLoader(digits()[:128], batch_sampler=Generators())
    learn.dls = DataLoaders(dl, dl, device='cpu')
    learn.dls._device = torch.device('cpu')
    assert_close(measure(learn), exact(learner()))

class Bare:
    "A loader of another package: batches and their number, no more"
    def __init__(self, dl, create=lambda b: b): self.dl,self.create = dl,create
    def __iter__(self): return (self.create(b) for b in self.dl)
    def __len__(self): return len(self.dl)

def bare(create=lambda b: b, **kwargs):
    learn = learner(**kwargs)
    learn.dls = DataLoaders(Bare(learn.dls.train, create), Bare(learn.dls.valid, create))
    learn.dls.n_inp,learn.dls._device = 1,torch.device('cpu')
    return learn

@each_method
def test_loader_with_no_more_than_batches(method):
    "The tensors tell, where they agree"
    want = exact(learner(items=digits()[:123]))
    assert_close(measure(bare(items=digits()[:123], drop_last=False), method, num_it=480), want)

def test_such_a_loader_whose_batches_do_not_tell():
    def first_dims_differ(b): return b[0],(b[1].repeat(2),)
    learn = bare(first_dims_differ, loss=lambda p, y: F.cross_entropy(p, y[0][:len(p)]))
    with pytest.raises(ValueError, match=r"can't tell how many items this batch has: .* first dimensions \[8, 16\]"):
        learn.bs_find(1e-12, num_it=40, show_plot=False)

def test_such_a_loader_has_one_size():
    for f in (lambda o: o.bs_find(1e-3, bs=4), lambda o: o.bs_profile()):
        with pytest.raises(ValueError, match='build your loaders with that batch size'): f(bare())
