"What benchmarks do with files that only some have: rows are generated here."
import sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

root = Path(__file__).parent.parent
bench = root/'bench'
pytestmark = pytest.mark.skipif(not bench.exists(), reason='needs the repository')

@pytest.fixture
def entities(monkeypatch):
    monkeypatch.syspath_prepend(bench)
    import entities
    return entities

def csv(path, name, **columns): pd.DataFrame(columns).to_csv(path/f'{name}.csv', index=False)

@pytest.fixture
def rossmann(tmp_path):
    "Two shops on 90 days, in the files of the fastai course; the first is closed on Sundays"
    days = pd.date_range('2015-01-01', periods=90)
    shop,date = np.repeat([1,2], 90),np.tile(days.strftime('%Y-%m-%d'), 2)
    weekday = np.tile(days.day_of_week+1, 2)
    is_open = ~((shop==1) & (weekday==7))
    csv(tmp_path, 'train', Store=shop, DayOfWeek=weekday, Date=date, Sales=(1000*shop+np.arange(180))*is_open, Customers=is_open*9, Open=is_open*1, Promo=weekday%2,
        StateHoliday=np.where(date=='2015-01-01', 'a', '0'), SchoolHoliday=0)
    csv(tmp_path, 'store', Store=[1,2], StoreType=['a','c'], Assortment=['a','b'], CompetitionDistance=[500.,np.nan], CompetitionOpenSinceMonth=[12,np.nan],
        CompetitionOpenSinceYear=[2014,np.nan], Promo2=[0,1], Promo2SinceWeek=[np.nan,1], Promo2SinceYear=[np.nan,2015], PromoInterval=[np.nan,'Jan,Apr,Jul,Oct'])
    csv(tmp_path, 'store_states', Store=[1,2], State=['HE','HB,NI'])
    csv(tmp_path, 'state_names', StateName=['Hessen','Niedersachsen'], State=['HE','HB,NI'])
    sundays = pd.date_range('2014-12-28', periods=14, freq='7D')
    weeks = [f'{o:%Y-%m-%d} - {o+pd.Timedelta(days=6):%Y-%m-%d}' for o in sundays]
    csv(tmp_path, 'googletrend', file=np.repeat(['Rossmann_DE_HE','Rossmann_DE_NI','Rossmann_DE'], 14), week=weeks*3, trend=np.arange(42))
    measured = dict.fromkeys('Max_TemperatureC Mean_TemperatureC Min_TemperatureC Max_Humidity Mean_Humidity Min_Humidity Max_Wind_SpeedKm_h Mean_Wind_SpeedKm_h CloudCover'.split(), np.arange(180.))
    csv(tmp_path, 'weather', file=np.repeat(['Hessen','Niedersachsen'], 90), Date=date, Events=['Rain',np.nan]*90, **measured)
    return tmp_path

def test_rossmann_is_joined(entities, rossmann):
    "Each row has the weather, the trend and the spans of its own day and state"
    df = entities.rossmann(rossmann)
    assert len(df)==180-13 and (df.Sales > 0).all() and df.Date.is_monotonic_increasing
    def at(store, date): return df[(df.Store==store) & (df.Date==date)].squeeze()
    a,b = at(1,'2015-01-03'),at(2,'2015-01-04') # a Saturday, the end of its week, and the Sunday that begins another
    assert (a.trend,a.trend_DE,b.trend,b.trend_DE)==(0,28,15,29)
    assert (a.Mean_TemperatureC,b.Mean_TemperatureC)==(2,93)
    assert at(1,'2015-03-16').CompetitionMonthsOpen==3 and b.CompetitionMonthsOpen==0 # 91 days; not known
    assert a.Promo2Weeks==0 and at(2,'2015-01-26').Promo2Weeks==3 # since Monday, the 5th
    assert np.isclose(a.log_sales, np.log(1002), rtol=1e-6) and at(1,'2015-01-01').StateHoliday=='a'

def test_rossmann_can_be_trained(entities, rossmann):
    "The last six weeks are for validation; gaps are filled"
    learn = entities.new_learner(entities.rossmann_sales, rossmann, 0, bs=16)
    items = learn.dls.valid_ds.items
    assert len(items)==2*42-6 and learn.dls.train.bs==16
    with learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    assert torch.isfinite(torch.tensor(learn.validate()[0]))

def test_missing_files_are_named(entities, tmp_path):
    with pytest.raises(SystemExit, match='train.csv not found'): entities.rossmann(tmp_path)
