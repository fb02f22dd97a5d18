"""Hard budgets: one ledger in the database, prepaid slices of it in each worker."""
