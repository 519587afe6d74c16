"""From run folders to tables, figures and a page. Imports no torch; of dash_exp only records, types and
statistics."""
