//! Network namespaces, queue rules and traffic for nfqnl.
