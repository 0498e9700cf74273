"""Which learning rate for a larger batch? Three epochs at batch sizes of 32 to 4,096, on MNIST and CIFAR, with SGD and momentum
and with Adam; the rate is flat and falls in the last quarter (`fit_flat_cos`).

`base`: the best rate at 32, of factors of two. `flat`: for a size that is k times as large, that rate times powers of k, with
exponents of 0 (constant), 1/4, 1/2 (square root), 3/4, 1 (linear) and 5/4; CIFAR, which takes eight times as long, does
without 1/4, 3/4 and the sizes of 128 and 2,048. `gradual` and `held`: the linear rule, with a first epoch in which the rate rises
to it, or in which it is that of 32 (arXiv 1706.02677). `said`: the noise rule and 0.7 of what `lr_race` says for each size, the
median of three; both are kept in `results/rates_said.csv`. (CIFAR at 4,096 has no race: its half a minute is less than ten
steps there, and all of a training is eighteen.) `half_life`: Adam whose β2 forgets by examples and not by steps
(arXiv 2507.07101). `layers`: fastai's Larc or Lamb at 4,096.

28,672 images of MNIST's training set, all of its test set; CIFAR as in the proof. Three seeds. All is kept in `results/rates/`, a
study in each folder; remove a folder to make it again. Only the races go by the clock. With `--jobs 2` MNIST takes an hour and
CIFAR two and a half."""
from proof import *
from fastai.optimizer import Lamb, Larc

bs_0,epochs,constant = 32,3,.7
sizes = dict(mnist=[128,512,2048,4096], cifar=[512,4096])
raced = dict(mnist=sizes['mnist'], cifar=[512])
exponents = dict(mnist=np.arange(6)/4, cifar=np.array([0,.5,1,1.25]))
first = dict(mnist_momentum=.005*2.**np.arange(5), mnist_adam=2.5e-4*2.**np.arange(6), cifar_momentum=.02*2.**np.arange(5),
             cifar_adam=1e-3*2.**np.arange(5)) # rates that are tried at 32
layerwise = dict(momentum=('larc',.02*4.**np.arange(5)), adam=('lamb',1e-3*4.**np.arange(5)))
opts = dict(momentum=partial(SGD, mom=.9), adam=Adam, larc=Larc, lamb=Lamb)
FOLDER,SAID = RESULTS/'rates','rates_said'

def images(data, name): return mnist_part(data, 7*4096) if name=='mnist' else loaders('CIFAR, Adam', data)

def rate_learner(data, name, opt, bs):
    model,half_life = small_convnet() if name=='mnist' else resnet8(),opt=='half_life'
    opt_func = partial(Adam, sqr_mom=.99**(bs/bs_0)) if half_life else opts[opt]
    dls = images(data, name).with_bs(bs, val_bs=1000)
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy)

def flat(learn, epochs, lr): learn.fit_flat_cos(epochs, lr)

def after_warmup(learn, epochs, lr, first):
    "An epoch by the schedule `first(base, lr)`, then flat and falling as in `fit_flat_cos`"
    scheds = [first(lr*bs_0/learn.dls.train.bs, lr),SchedNo(lr, lr),SchedCos(lr, lr/1e5)]
    learn.fit(epochs, cbs=ParamScheduler(dict(lr=combine_scheds([1/epochs,.75-1/epochs,.25], scheds))))
def gradual(learn, epochs, lr): after_warmup(learn, epochs, lr, SchedLin)
def held(learn, epochs, lr): after_warmup(learn, epochs, lr, lambda base,lr: SchedNo(base, base))

def study(data, name, opt, what, lrs, fit=flat, opt_func=None, **kw):
    "Trainings at the batch sizes and rates of `lrs`"
    return bs_study(partial(rate_learner, data, name, opt_func or opt), list(lrs), lrs, epochs=epochs, fit=fit,
                    path=FOLDER/f'{name}_{opt}'/what, **kw)

def grid(name, lr, most=2):
    "Rates for each batch size, with exponents of less than `most`"
    return {bs: [lr*(bs/bs_0)**o for o in exponents[name] if o < most] for bs in sizes[name]}

def say(data, name, opt, lr):
    "A seed's noise scale, and what `lr_race` says for each batch size that has one"
    def learner(bs, seed):
        set_seed(seed)
        return rate_learner(data, name, opt, bs).remove_cb(ProgressCallback)
    def one(seed):
        learn = learner(bs_0, seed)
        learn.bs_find(lr, show_plot=False)
        races = {f'lr_{bs}': learner(bs, seed).lr_race(lr=lr, show_plot=False).lr for bs in raced[name]}
        return dict(noise_scale=learn.recorder.settled().noise_scale) | races
    return kept(SAID, f'{name}_{opt}', 3, one).median(numeric_only=True)

def rules(name, lr, said, opt):
    "What each rule says, by batch size"
    def noise(bs): return scale_lr(lr, bs_0, bs, 'noise', said.noise_scale, opt=opts[opt])
    says = {'constant': lambda bs: lr, 'square root': lambda bs: lr*(bs/bs_0)**.5, 'linear': lambda bs: lr*bs/bs_0,
            'noise rule': noise}
    by_size = {k: {bs: f(bs) for bs in sizes[name]} for k,f in says.items()}
    return by_size | dict(race={bs: constant*said[f'lr_{bs}'] for bs in raced[name]})

def make(data, name, opt, **kw):
    few = partial(study, data, name, opt, **kw)
    lr = few('base', {bs_0: list(first[f'{name}_{opt}'])}).best().lr[bs_0]
    few('flat', grid(name, lr))
    linear = {bs: [lr*bs/bs_0] for bs in sizes[name]}
    for fit in (gradual,held): few(fit.__name__, linear, fit)
    by_rule = rules(name, lr, say(data, name, opt, lr), opt)
    few('said', {bs: [by_rule[o][bs] for o in ('noise rule','race') if bs in by_rule[o]] for bs in sizes[name]})
    if opt=='adam': few('half_life', grid(name, lr, 1), opt_func='half_life')
    by_layer,lrs = layerwise[opt]
    few('layers', {sizes[name][-1]: list(lrs)}, opt_func=by_layer)

def load(name, opt, what): return Study.load(FOLDER/f'{name}_{opt}'/what)

def base(name, opt): return load(name, opt, 'base').best().lr[bs_0]

def at(study, lrs):
    "The rows of a study with the rate that `lrs` has for their batch size"
    df = study.df
    return df[np.isclose(df.lr, df.bs.map(lrs), rtol=1e-5, atol=0)]

def best(study):
    "The rows with the rate that has the highest mean accuracy, for each batch size"
    return at(study, study.df.groupby(['bs','lr']).accuracy.mean().unstack().idxmax(axis=1))

def by_method(name, opt):
    "Rows of the trainings by each method"
    o,lr = partial(load, name, opt),base(name, opt)
    all_rules = rules(name, lr, pd.read_csv(RESULTS/f'{SAID}.csv').query(f'task=="{name}_{opt}"').median(numeric_only=True), opt)
    res = {'best of the grid': best(o('flat'))} | {k: at(o('said' if k in ('noise rule','race') else 'flat'), v)
                                                  for k,v in all_rules.items()}
    res |= {'linear, gradual warm-up': o('gradual').df, 'linear, constant warm-up': o('held').df}
    if opt=='adam': res['best with the half-life of β2'] = best(o('half_life'))
    return res | {f'best of {layerwise[opt][0].title()}': best(o('layers'))}

def results(name, opt):
    "A row for each method, a column for each batch size: accuracy in per cent, mean and standard deviation over the seeds"
    say = partial(spread, digits='.1f', digits_std='.1f')
    rows = {k: (100*df.set_index('bs').accuracy).groupby('bs').agg(say) for k,df in by_method(name, opt).items()}
    return pd.DataFrame(rows).T.reindex(columns=sizes[name]).fillna('').rename(columns=str)

def lost(name, opt):
    "Points of accuracy below the best of the grid, mean over the seeds; with a star where it is so with each seed"
    acc = {k: 100*o.set_index(['bs','seed']).accuracy for k,o in by_method(name, opt).items()}
    top = acc.pop('best of the grid')
    def say(o): return f'{o.mean():.1f}' + ('*' if (o > 0).all() else '')
    rows = {k: (top-o).dropna().groupby('bs').agg(say) for k,o in acc.items()}
    return pd.DataFrame(rows).T.reindex(columns=sizes[name]).fillna('').rename(columns=str)

if __name__=='__main__':
    p = parser(__doc__, data=True, seeds=3, jobs=1)
    p.add_argument('--only', nargs='+', choices=list(first), default=list(first), help=f'default: {" ".join(first)}')
    args = p.parse_args()
    torch.set_num_threads(1)
    for o in args.only:
        make(args.data, *o.split('_'), n_seeds=args.seeds, n_jobs=args.jobs, progress=False)
        print(f'## {o}, from {base(*o.split("_")):.3g} at 32\n')
        table(results(*o.split('_')).reset_index(names='').to_dict('records'))
