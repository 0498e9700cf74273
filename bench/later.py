"""Can the noise scale at the end of a training be told at its beginning? On the tasks of the proof (`tasks.py`), with batches of
64 and a peak of the learning rate that `lr_race` has found, whole one-cycle trainings are rehearsed in miniature, in 50 and
100 steps, and the noise scale is measured where they end, at weights that stay where they are. A power law through the two
is continued to the steps of the real training, of as many epochs as the task's courses have. Then that is really made, and
measured likewise. Each is made `--seeds` times, on batches in other orders, and `scatter` is the largest over the smallest of
these single noise scales; all others are from the means of noise and scale. `bs_find` has what that would measure.

What is measured is kept in `results/later.csv`; remove it to measure again."""
from proof import *
from fastai.callback.schedule import combined_cos
from fastai_bs_finder.finder import BSFinder, EndSearch
from fastai_bs_finder.lr import Races
from fastai_bs_finder.stats import RunningNoiseScale, noise_scale

class OneCycle(Callback):
    "The schedule of `fit_one_cycle` over `n` steps, however many epochs they take"
    order,run_valid = 60,False
    def __init__(self, n, lr):
        self.n,self.k = n,0
        self.lr,self.mom = combined_cos(.25, lr/25, lr, lr/1e5),combined_cos(.25, .95, .85, .95)
    def before_batch(self):
        self.opt.set_hyper('lr', self.lr(self.k/self.n))
        if 'mom' in self.opt.hypers[0] and self.opt.hypers[0]['mom']: self.opt.set_hyper('mom', self.mom(self.k/self.n))
        self.k += 1
    def after_batch(self):
        if self.k==self.n: raise CancelFitException()

def at_rest(learn):
    "Noise and scale at the weights that `learn` has"
    finder = BSFinder(beta=1.)
    learn.fit(10, 0., cbs=[finder,EndSearch(finder, 100)], reset_opt=False)
    return finder.search.noise[-1],finder.search.scale[-1]

def cycle(learn, n, lr): learn.fit(math.ceil(n/len(learn.dls.train))+1, lr, cbs=OneCycle(n, lr))

def after(learn, train, n_seeds):
    "Train and measure, with batches in several orders: the noise scale, its interval, the largest of all over the smallest"
    points,singles = RunningNoiseScale(1.),[]
    for seed in range(n_seeds):
        with preserve(learn), learn.no_logging():
            set_seed(seed)
            learn.dls.train.rng = random.Random(seed)
            train(seed)
            noise,scale = at_rest(learn)
        points.add(seed, noise, scale)
        singles.append(noise_scale(noise, scale))
    return noise_scale(*points.means()),*points.interval(),max(singles)/max(min(singles), 1e-9)

def measure(task, data, n_seeds, _):
    learn = new_learner(task, data, 0)
    lr = learn.lr_race(seconds=20, show_plot=False).lr
    n,races = tasks[task].epochs*len(learn.dls.train),Races(learn)
    short,longer,end = (after(learn, lambda _: cycle(learn, o, lr), n_seeds) for o in (50,100,n))
    now = after(learn, lambda seed: races.fit(64, lr, 60, order=seed), n_seeds)
    law = longer[0]*(longer[0]/short[0])**math.log2(n/100)
    return dict(lr=lr, steps=n, ns_50=short[0], ns_100=longer[0], law=law, bs_find=now[0], scatter=now[-1],
                end=end[0], lower=end[1], upper=end[2], scatter_end=end[-1])

def main():
    args = parser(__doc__, data=True, seeds=4).parse_args()
    df = pd.concat([kept('later', o, 1, partial(measure, o, args.data, args.seeds)) for o in tasks])
    df['law/end'],df['bs_find/end'] = df.law/df.end,df.bs_find/df.end
    table(df.to_dict('records'))
    off = {k: float(np.exp(np.log(df[k].replace([0,math.inf], np.nan)).abs().median())) for k in ('law/end','bs_find/end')}
    print('off by a factor of, median: ' + ', '.join(f'{k} {v:.1f}' for k,v in off.items()))

if __name__=='__main__': main()
