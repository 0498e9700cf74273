"""Can I increase the batch size indefinitely? The three regimes of scaling (arXiv 1811.03600), on sweeps in which the learning
rate was tuned at every batch size.

Those of MNIST, CIFAR and Flights are the proof's (`proof.py`). MNIST with SGD and momentum 0.9 is trained here, the same
network to the same validation loss, and is kept in `results/proof/mnist_momentum/`: half an hour with `--jobs 2`. What
`bs_find()` says of it, three times, is kept in `results/regimes_recipe.csv`. The rest is printed from what is kept."""
from proof import *
from fastai_bs_finder.stats import regimes

shown = ['MNIST, SGD', momentum, 'MNIST, Adam', 'CIFAR, Adam', 'Flights, Adam']

def sweep(task): return Study.load(folder(task, 'sweep'))

def noise_scale(task):
    "The median of what `bs_find()` has said"
    df = pd.read_csv(RESULTS/('regimes_recipe.csv' if task==momentum else 'proof_recipe.csv'))
    return df[df.task==task].noise_scale.median()

def ends(regimes):
    "The batch sizes up to which scaling is perfect, and from which it is of no use; None: none of those that were tried"
    return regimes.perfect and regimes.perfect[1], regimes.maximal and regimes.maximal[0]

def resampled(study, n=200, level=.95):
    "The lowest and highest end of each regime, when the seeds are drawn again; None: in no draw"
    rng,df,res = np.random.default_rng(0),study.df,[]
    good = df[df.reached & np.isclose(df.lr, df.bs.map(study.best().lr))]
    runs = {bs: o.steps_to_target.to_numpy() for bs,o in good.groupby('bs')}
    for _ in range(n): res.append(ends(regimes(list(runs), [np.median(rng.choice(o, len(o))) for o in runs.values()])))
    def inner(o):
        o = [v for v in o if v]
        return o and tuple(np.quantile(o, [(1-level)/2, (1+level)/2], method='nearest'))
    return [inner(o) for o in zip(*res)]

def among(o): return '{:,.0f} to {:,.0f}'.format(*o) if o else 'none'

def row(task):
    "Where each regime ends, and where `bs_find` said that it would"
    study = sweep(task)
    fit,(perfect,useless),(p_range,u_range) = study.critical(),ends(study.regimes()),resampled(study)
    return {
        'task':task, 'perfect up to':perfect, 'of seeds':among(p_range), 'no use from':useless, 'of seeds ':among(u_range),
        'fitted':f'{fit.critical:,.0f} ({fit.lower:,.0f} to {fit.upper:,.0f})', 'bs_find':round(noise_scale(task))}

if __name__=='__main__':
    p = parser(__doc__, data=True, seeds=3, jobs=1)
    args = p.parse_args()
    t = more_tasks[momentum]
    bs_study(partial(learner, momentum, args.data), t.bss, target=t.target, max_examples=t.max_examples, lr=t.lr, lr_bs=64,
             path=folder(momentum, 'sweep'), n_seeds=args.seeds, n_jobs=args.jobs)
    kept('regimes_recipe', momentum, 3, partial(recipe, momentum, args.data))
    table([row(o) for o in shown])
