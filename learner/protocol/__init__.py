"""Who did what with which weights: chunks of work, the bound on staleness, ledger, receipts, quarantine."""
