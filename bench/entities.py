"""Four times faster and better? A table with entities and time, three one-cycles, batches of 64 against what `bs_find()` says.

An article on batch sizes (2019) has reported of the Rossmann sales that batches of 512 instead of 64 took a quarter of the time
and ended with a lower loss. Here it is tried on the arrival delays of `flights.csv.zip`; and on Rossmann with `--task rossmann`
by those who have the files of the fastai course in the folder: train, store, store_states, state_names, googletrend and
weather, each `.csv`. (Of the course's columns those are left out that count the days to and from holidays and promotions, and
how many there are in the weeks around.)

Batches of 64 train with the `valley` of `lr_find` and with the rate of `bs_find`'s table, three cycles of an epoch each; the third
plan is `bs_find(epochs=1)`: its batch size, rate and epochs, three cycles likewise. Five seeds; let nothing else run beside it. All
is kept in `results/entities.csv`; an hour for the flights."""
from proof import *
from fastai.tabular.all import tabular_config

RUNS = RESULTS/'entities.csv'
names = 'train store store_states state_names googletrend weather'.split()
cats = ('Store DayOfWeek Year Month Day Week StateHoliday Promo2Weeks CompetitionMonthsOpen StoreType Assortment PromoInterval '
        'State Events').split()
conts = ('CompetitionDistance Promo SchoolHoliday Max_TemperatureC Mean_TemperatureC Min_TemperatureC Max_Humidity Mean_Humidity '
         'Min_Humidity Max_Wind_SpeedKm_h Mean_Wind_SpeedKm_h CloudCover trend trend_DE').split()

def trends(df):
    "How often people have searched for the shop, by state and by the Sunday that a week begins with"
    df = pd.DataFrame(dict(State=df.file.str.split('_').str[2], sunday=pd.to_datetime(df.week.str[:10]), trend=df.trend))
    return df.replace(dict(State={'NI': 'HB,NI'})) # as the two are called in `store_states`

def since(date, begin, days, most):
    "Whole spans of `days` from `begin` to `date`, from 0 to `most`; 0 where it is not known"
    return ((date-begin).dt.days//days).clip(0, most).fillna(0).astype(int)

def first_of(year, part, day, form):
    "The date that is written in two columns of numbers, and a day; not a time where they are missing"
    text = year.astype('Int64').astype(str)+'-'+part.astype('Int64').astype(str)+day
    return pd.to_datetime(text, format=form, errors='coerce')

def rossmann(data):
    "A row for each shop and day on which it was open, joined from the files of the course; the target is the logarithm of sales"
    d = {k: pd.read_csv(need(data/f'{k}.csv'), low_memory=False) for k in names}
    df = d['train'][d['train'].Sales > 0].copy()
    df['Date'],d['weather']['Date'] = (pd.to_datetime(o.Date) for o in (df,d['weather']))
    df['sunday'] = df.Date-pd.to_timedelta((df.Date.dt.day_of_week+1)%7, 'D')
    df = df.merge(d['store'], 'left', 'Store').merge(d['store_states'], 'left', 'Store').merge(d['state_names'], 'left', 'State')
    df = df.merge(d['weather'].rename(columns={'file': 'StateName'}), 'left', ['StateName','Date'])
    by_state = trends(d['googletrend'])
    whole = by_state[by_state.State.isna()].rename(columns={'trend': 'trend_DE'})
    df = df.merge(by_state.dropna(), 'left', ['State','sunday']).merge(whole.drop(columns='State'), 'left', 'sunday')
    for o in ('Year','Month','Day'): df[o] = getattr(df.Date.dt, o.lower())
    df['Week'] = df.Date.dt.isocalendar().week.astype(int)
    rival = first_of(df.CompetitionOpenSinceYear, df.CompetitionOpenSinceMonth, '-15', '%Y-%m-%d')
    promo = first_of(df.Promo2SinceYear, df.Promo2SinceWeek, '-1', '%Y-%W-%w')
    df['CompetitionMonthsOpen'],df['Promo2Weeks'] = since(df.Date, rival, 30, 24),since(df.Date, promo, 7, 25)
    df['StateHoliday'] = df.StateHoliday.astype(str)
    df['log_sales'] = np.log(df.Sales).astype('float32')
    return df.sort_values('Date', ignore_index=True)

def rossmann_dls(data):
    "The last six weeks are for validation"
    df = rossmann(data)
    valid = list(np.flatnonzero(df.Date > df.Date.max()-pd.Timedelta(days=42)))
    return TabularDataLoaders.from_df(
        df, procs=[Categorify,FillMissing,Normalize], cat_names=cats, cont_names=conts, y_names='log_sales',
        y_block=RegressionBlock(), valid_idx=valid, bs=64, device='cpu')

def sales(dls):
    "The course's learner"
    top = float(dls.train_ds.items.log_sales.max())*1.2
    return tabular_learner(dls, layers=[1000,500], config=tabular_config(ps=[.001,.01], embed_p=.04, y_range=(0,top)))

flights,rossmann_sales = 'Flights, Adam','Rossmann, Adam'
more_tasks[rossmann_sales] = more_tasks[flights]._replace(dls=rossmann_dls, learner=sales) # of a task these two are used here

def plans(task, data, seed):
    "Batch size, epochs of a cycle and rate, by plan; and the seconds of the search"
    at_64,learn,start = valley(task, data, seed)['valley'],new_learner(task, data, seed),time.perf_counter()
    sugg = learn.bs_find(epochs=1, show_plot=False)
    seconds = time.perf_counter()-start
    return seconds,{"64, lr_find's valley": (64,1,at_64), "64, the table's rate": (64,1,learn.recorder.bs_table().lr[64]),
                    'as bs_find says': (sugg.fastest,sugg.epochs,sugg.lr)}

def train(task, data, seed, bs, epochs, lr, cycles=3):
    "Losses after each cycle; seconds of training alone"
    learn,seconds,rows = new_learner(task, data, seed, int(bs)),0.,[]
    for cycle in range(1, cycles+1):
        start = time.perf_counter()
        with learn.no_logging(): learn.fit_one_cycle(epochs, lr)
        seconds += time.perf_counter()-start
        train_loss = learn.validate(dl=learn.dls.train.new(shuffle=False, drop_last=False, bs=1000))[0]
        rows.append(dict(cycle=cycle, seconds=seconds, train_loss=train_loss, valid_loss=learn.validate()[0]))
    return rows

def make(task, data, seeds):
    done = pd.read_csv(RUNS) if RUNS.exists() else pd.DataFrame(columns=['task','seed'])
    for seed in range(seeds):
        if ((done.task==task) & (done.seed==seed)).any(): continue
        search,todo = plans(task, data, seed)
        rows = [dict(task=task, seed=seed, plan=k, bs=o[0], epochs=o[1], lr=o[2], search=search) | r
                for k,o in todo.items() for r in train(task, data, seed, *o)]
        pd.DataFrame(rows).to_csv(RUNS, mode='a', header=not RUNS.exists(), index=False, float_format='%.6g')

def results(task):
    "After each cycle, means over the seeds with their standard deviations, and the time as a part of that of the first plan"
    df = pd.read_csv(RUNS).query('task==@task')
    first = df[df.plan.str.contains('valley')].groupby('cycle').seconds.mean()
    res = df.groupby(['plan','cycle'], sort=False).agg(
        bs=('bs', lambda o: ', '.join(map(str, sorted(set(o))))), seconds=('seconds','mean'),
        **{o: (o,partial(spread, digits='.4f', digits_std='.4f')) for o in ('train_loss','valid_loss')})
    res.insert(2, 'time', res.seconds/first.reindex(res.index, level='cycle'))
    return res

if __name__=='__main__':
    p = parser(__doc__, data=True, seeds=5)
    p.add_argument('--task', choices=['flights','rossmann'], default='flights', help='default: %(default)s')
    args = p.parse_args()
    task = dict(flights=flights, rossmann=rossmann_sales)[args.task]
    make(task, args.data, args.seeds)
    table(results(task).reset_index().to_dict('records'))
