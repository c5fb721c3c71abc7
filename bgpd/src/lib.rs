//! A native BGP speaker for Kubernetes nodes, route reflectors and fabric routers.

pub mod fsm;
