"""The six tasks of the proof: what to train, with which learner, to which validation loss, and where tuning begins.

`learner(task, data, bs)` builds one. Loaders are made once a process, and then only given another batch size."""
from curves import *
import functools, tempfile, zipfile
from typing import NamedTuple
from fastai.vision.all import (
    DisplayedTransform, ImageDataLoaders, IntToFloatTensor, Normalize, ResBlock, TensorImage, cifar_stats, error_rate)

def tensor_dls(xs, ys, n_valid):
    "Loaders over two tensors, the last `n_valid` items for validation"
    items = list(zip(xs, ys))
    return DataLoaders.from_dsets(
        items[:-n_valid], items[-n_valid:], bs=64, num_workers=0, shuffle=True, drop_last=True, device='cpu')

def mnist_dls(data): return tensor_dls(*mnist_tensors(data), 3000)

@functools.cache
def mnist_part(data, n):
    "The first `n` training images and all test images, in loaders"
    train,test = list(zip(*mnist_tensors(data, n))),list(zip(*mnist_tensors(data, part='test')))
    return DataLoaders.from_dsets(train, test, bs=64, num_workers=0, shuffle=True, drop_last=True, device='cpu')

def adult_dls(data):
    set_seed(0) # of the split, which `from_df` draws
    return adult(data).dls

def republic_dls(data):
    learn = republic(data, seq_len=32, n=32)
    x,y = (torch.stack(o) for o in zip(*learn.dls.train_ds))
    dls = tensor_dls(x, y, 1000)
    dls.n_vocab = learn.model.head.out_features
    return dls

class FlipAndCrop(DisplayedTransform):
    "Of training images: half are mirrored, and all are cut out of a larger one that has 4 more pixels on each side"
    split_idx = 0
    def encodes(self, x:TensorImage):
        n,_,h,w = x.shape
        x = torch.where((torch.rand(n) < .5)[:,None,None,None].to(x.device), x.flip(3), x)
        views = F.pad(x, [4]*4, mode='reflect').unfold(2, h, 1).unfold(3, w, 1)
        i,j = torch.randint(0, 9, (2,n))
        return views[torch.arange(n), :, i, j]

def cifar_dls(data):
    "25,000 training images, decoded once; every fifth of the test images for validation, since they are looked at often"
    with tempfile.TemporaryDirectory() as tmp:
        zipfile.ZipFile(need(data/'cifar10.zip')).extractall(tmp)
        read = ImageDataLoaders.from_folder(Path(tmp)/'cifar10', train='train', valid='test', num_workers=0, device='cpu')
        train,valid = ([(TensorImage(np.array(x)).permute(2,0,1),y) for x,y in ds] for ds in (read.train_ds,read.valid_ds))
    n = len(train)
    xs,ys = zip(*train, *valid[::5])
    dsets = Datasets(range(len(xs)), [xs.__getitem__,ys.__getitem__], splits=[range(n),range(n, len(xs))])
    return dsets.dataloaders(
        bs=64, num_workers=0, device='cpu',
        after_batch=[IntToFloatTensor(), FlipAndCrop(), Normalize.from_stats(*cifar_stats, cuda=False)])

def resnet8():
    "Three residual blocks with batch norm, 78,000 parameters"
    return nn.Sequential(
        ConvLayer(3, 16, stride=2), ResBlock(1, 16, 16), ResBlock(1, 16, 32, stride=2), ResBlock(1, 32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

def flights_dls(data):
    """Arrival delay by what is known before departure. Delays are cut off at 3 hours, in the data for validation too: they
    reach 21 hours, and by its square each of the few later ones would weigh as much as dozens of ordinary ones"""
    flights,weather = pd.read_csv(need(data/'flights.csv.zip')),pd.read_csv(need(data/'flights_weather.csv'))
    df = flights.dropna(subset='arr_delay').merge(
        weather.drop(columns=['year','month','day','hour']), on=['origin','time_hour'], how='left')
    df['weekday'] = pd.to_datetime(df[['year','month','day']]).dt.dayofweek
    df['scheduled'] = df.sched_dep_time//100 + df.sched_dep_time%100/60
    last = df.sched_arr_time//100 + df.sched_arr_time%100/60
    df['planned'] = (last-df.scheduled)%24 # hours by the clocks of both airports
    late = df.arr_delay.clip(upper=180)
    df['late'] = ((late-late.mean())/late.std()).astype('float32')
    conts = 'scheduled planned distance temp dewp humid wind_dir wind_speed wind_gust precip pressure visib'.split()
    return TabularDataLoaders.from_df(
        df, procs=[Categorify,FillMissing,Normalize], cat_names='month day weekday hour carrier origin dest tailnum'.split(),
        cont_names=conts, y_names='late', y_block=RegressionBlock(), valid_idx=list(range(0, len(df), 100)), bs=64, device='cpu')

def classifier(dls, opt_func): return Learner(dls, small_convnet(), CrossEntropyLossFlat(), opt_func=opt_func)
def census(dls): return tabular_learner(dls, layers=[200,100])
def tiny_lm(dls): return Learner(dls, TinyLM(dls.n_vocab, 32, 32), CrossEntropyLossFlat())
def small_resnet(dls): return Learner(dls, resnet8(), CrossEntropyLossFlat(), metrics=error_rate)
def delay(dls): return tabular_learner(dls, layers=[200,100], emb_szs={'tailnum': 10})

class Task(NamedTuple):
    dls:callable # Of the folder with the data
    learner:callable # Of loaders
    target:float # Validation loss to reach
    lr:float # Where tuning begins, at batches of 64
    bss:list # Batch sizes of the sweep
    max_examples:float # After so many a run is given up
    epochs:int # Of a course
    courses:list # Batch sizes of the courses
    peaks:list # Their learning rates

sgd_peaks,adam_peaks = .1*2.**np.arange(5),2e-3*2.**np.arange(6)

tasks = {
    'MNIST, SGD': Task(
        mnist_dls, partial(classifier, opt_func=SGD), .1, .2, 2**np.arange(4, 12), 1.6e6, 1, 2**np.arange(6, 10), sgd_peaks),
    'MNIST, Adam': Task(
        mnist_dls, partial(classifier, opt_func=Adam), .1, 4e-3, 2**np.arange(3, 13), 6e5, 1, 2**np.arange(6, 11), adam_peaks),
    'Adult, Adam': Task(adult_dls, census, .355, 2e-3, 2**np.arange(4, 13), 2e5, 2, 2**np.arange(6, 12), adam_peaks),
    'Republic, Adam': Task(republic_dls, tiny_lm, 2., 8e-3, 2**np.arange(3, 11), 2e5, 1, 2**np.arange(5, 9), adam_peaks),
    'CIFAR, Adam': Task(cifar_dls, small_resnet, 1.35, 4e-3, 2**np.arange(4, 11), 3e5, 2, [128], adam_peaks[1:4]),
    'Flights, Adam': Task(flights_dls, delay, .86, 1e-3, 2**np.arange(5, 13), 1e6, 1, 2**np.arange(6, 13), adam_peaks)}

momentum = 'MNIST, momentum' # beside the six
more_tasks = tasks | {momentum: tasks['MNIST, SGD']._replace(
    learner=partial(classifier, opt_func=partial(SGD, mom=.9)), lr=.02, peaks=sgd_peaks/8)}

@functools.cache
def loaders(task, data): return more_tasks[task].dls(data)

def learner(task, data, bs): return more_tasks[task].learner(loaders(task, data).with_bs(int(bs), val_bs=250))
