"""From run folders to tables, figures and a page. Imports no torch; of dash_exp only records, errors and
statistics. An installed package holds this folder as `dash_exp_analysis`: imports between its modules are
relative."""

COMMAND = "python -m analysis" if __name__ == "analysis" else "dash-exp report"
