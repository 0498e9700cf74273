"""Can the noise scale at the end of a training be told at its beginning? On the tasks of the proof (`tasks.py`), with batches of
64 and a peak of the learning rate that `lr_race` has found, whole one-cycle trainings are rehearsed in miniature, in 50 and
100 steps, and the noise scale is measured where they end, at weights that stay where they are. A power law through the two
is continued to the steps of the real training, of as many epochs as the task's courses have. Then that is really made, and
measured likewise. A column has what `bs_find` would say, the noise scale after 60 steps.

What is measured is kept in `results/later.csv`; remove it to measure again."""
from proof import *
from fastai.callback.schedule import combined_cos
from fastai_bs_finder.finder import BSFinder, EndSearch
from fastai_bs_finder.lr import Races

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
    "Noise scale and its interval at the weights that `learn` has"
    finder = BSFinder(beta=1.)
    learn.fit(10, 0., cbs=[finder,EndSearch(finder, 1000, tol=.15)], reset_opt=False)
    return finder.search.noise_scale[-1],finder.search.lower[-1],finder.search.upper[-1]

def after(learn, n, lr):
    "Train for `n` steps, measure, and go back"
    with preserve(learn), learn.no_logging():
        learn.fit(math.ceil(n/len(learn.dls.train))+1, lr, cbs=OneCycle(n, lr))
        return at_rest(learn)

def measure(task, data, seed):
    learn = new_learner(task, data, seed)
    lr = learn.lr_race(seconds=20, show_plot=False).lr
    n = tasks[task].epochs*len(learn.dls.train)
    (short,*_),(longer,*_),(end,lower,upper) = (after(learn, o, lr) for o in (50,100,n))
    races = Races(learn)
    with preserve(learn), learn.no_logging():
        races.fit(64, lr, 60)
        found = at_rest(learn)[0]
    law = longer*(longer/short)**math.log2(n/100)
    return dict(seed=seed, lr=lr, steps=n, ns_50=short, ns_100=longer, predicted=law, bs_find=found, at_the_end=end,
                lower=lower, upper=upper)

def main():
    args = parser(__doc__, data=True, seeds=2).parse_args()
    df = pd.concat([kept('later', o, args.seeds, partial(measure, o, args.data)) for o in tasks])
    df['predicted/end'],df['bs_find/end'] = df.predicted/df.at_the_end,df.bs_find/df.at_the_end
    table(df.to_dict('records'))
    off = {k: float(np.exp(np.log(df[k].replace(math.inf, np.nan)).abs().median())) for k in ('predicted/end','bs_find/end')}
    print('off by a factor of, median: ' + ', '.join(f'{k} {v:.1f}' for k,v in off.items()))

if __name__=='__main__': main()
