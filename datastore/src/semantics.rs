//! temporary
use cali_api::AnyResource;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    pub path: String,
    pub message: String,
}
impl FieldError {
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: message.into(),
        }
    }
}
pub(crate) fn validate(_o: &AnyResource) -> Result<(), Vec<FieldError>> {
    Ok(())
}
pub(crate) fn defaults(_o: &mut AnyResource) {}
pub(crate) fn to_calico(_o: &AnyResource) -> Vec<AnyResource> {
    cali_api::kubernetes::to_calico(_o)
}
